"""A model of experts and latent attention over a cluster: its workers give the tokens of transformers, and of PEFT."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import peft
import pytest
import torch
import transformers

import baton
from baton.tests.integration.cluster import Cluster

DEMO = Path(baton.__file__).parent / "models" / "demo"
VOCAB_SIZE, MAX_TOKENS = 4096, 12
ADAPTERS = ("one", "two")


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, transformers.PreTrainedModel]:
    """A random DeepSeek V3 with the demo's tokenizer, and transformers' own."""
    torch.manual_seed(5)
    config = transformers.DeepseekV3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=48,
        intermediate_size=80,
        moe_intermediate_size=40,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        n_routed_experts=8,
        n_group=4,
        topk_group=2,
        num_experts_per_tok=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=24,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=12,
        head_dim=8,
        max_position_embeddings=512,
        eos_token_id=1,
    )
    model = transformers.DeepseekV3ForCausalLM(config).eval()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and "inv_freq" not in name:
            tensor.data = torch.randn_like(tensor) * 0.2 + ("norm" in name)
    folder = tmp_path / "deepseek"
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / file, folder)
    return folder, model


@pytest.fixture
def adapted(made, tmp_path: Path) -> peft.PeftModel:  # type: ignore[no-untyped-def]
    """The model with random adapters of its attention, routed experts and routers, saved in a folder for each."""
    config = peft.LoraConfig(
        r=4,
        target_modules=["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
    )
    model = peft.get_peft_model(made[1], config, ADAPTERS[0])
    model.add_adapter(ADAPTERS[1], config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.2
    model.save_pretrained(tmp_path / "adapters")
    return model.eval()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_handed_over_chunked_and_cached_prompts_give_the_tokens_of_transformers(
    made: tuple[Path, transformers.PreTrainedModel], adapted: peft.PeftModel, tmp_path: Path
) -> None:
    """Guards what a transfer carries of latent attention, experts that another worker computed the prompt with, and KV
    of the same prompt with an adapter of experts and routers, with another, and without."""
    chance = torch.Generator().manual_seed(2)
    prompts = [torch.randint(5, VOCAB_SIZE, (size,), generator=chance).tolist() for size in (3, 17, 40, 40, 90, 130)]
    cases = [(prompt, "") for prompt in prompts] + [(prompt, name) for name in ADAPTERS for prompt in prompts[-2:]]
    with Cluster(
        model=str(made[0]),
        proxy_args=(
            *("--local-prefill", "never", "--lora-modules"),
            *(f"{name}={tmp_path / 'adapters' / name}" for name in ADAPTERS),
        ),
        worker_args=("--max-loras", "2"),
        prefill_args=("--max-chunk-tokens", "24"),
        log_folder=tmp_path,
    ) as cluster:

        def ask(case: tuple[list[int], str]) -> list[int]:
            prompt, name = case
            body = {"max_tokens": MAX_TOKENS, "ignore_eos": True, "return_token_ids": True}
            answer = cluster.complete(prompt, **(body | ({"model": name} if name else {})))
            return list(answer["choices"][0]["token_ids"])

        with ThreadPoolExecutor(len(cases)) as threads:
            answers = list(threads.map(ask, cases))
        assert [ask(case) for case in cases] == answers, "with prefix hits"
        assert sum(cluster.worker_values("transfers_received_total").values()) > 0
    for (prompt, name), answer in zip(cases, answers, strict=True):
        if name:
            adapted.set_adapter(name)
        with torch.inference_mode(), nullcontext() if name else adapted.disable_adapter():
            theirs = adapted(torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        assert answer == theirs.argmax(-1).tolist(), name
    assert len({tuple(answer) for answer in answers}) == len(cases), "an adapter changes nothing"
    assert len({token for answer in answers for token in answer}) > 20, "a model that repeats itself shows nothing"
