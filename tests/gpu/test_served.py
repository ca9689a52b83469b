"""Whole clusters on one GPU: a prefill and a decode worker whose models are more than dense Llamas, over cuda_ipc."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")
pytest.importorskip("transformers", reason="it makes the models")

import transformers

from baton.benchmark.cluster.completions import random_ids
from baton.benchmark.cluster.running import metrics, running
from baton.launch.local import ServeSettings
from baton.node.modelhub import DEMO_MODEL, locate_model

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(180)]

MAX_TOKENS, VOCAB_SIZE = 24, 4096
WIDE = {
    "hidden_size": 512,
    "intermediate_size": 768,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
FAMILIES = {
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "head_dim": 64},
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 64, "sliding_window": 100},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 128},
    "olmo2": {},
}
"""Experts; sinks, biases and windows; norms of whole rows; a model that only transformers runs."""
WORKER = ("--dtype=float32", "--max-num-seqs=8", "--num-blocks=200", "--max-model-len=1024", "--plane=cuda_ipc")


def make_folder(folder: Path, family: str) -> transformers.PreTrainedModel:
    """A random model with the demo's tokenizer; returns transformers' own."""
    torch.manual_seed(11)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(family, **WIDE | FAMILIES[family])
    ).eval()
    for name, parameter in model.named_parameters():
        spread = torch.randn_like(parameter) * 0.05
        parameter.data = 1 + spread if "norm" in name else spread
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(locate_model(DEMO_MODEL) / name, folder)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_handed_over_prompts_give_the_tokens_of_transformers(tmp_path, family):
    """Guards the start of a worker with such a model, the layout of the KV that moves, and steps of several rows."""
    model = make_folder(tmp_path / family, family)
    settings = ServeSettings(
        model=str(tmp_path / family),
        device="cuda",
        gpus=(0,),
        local_prefill="never",
        store_ram_gib=0.0,
        worker_arg=WORKER,
        prefill_arg=("--max-chunk-tokens=128",),
        start_timeout_s=120.0,
    )
    prompts = [random_ids(length, number) for number, length in enumerate((3, 64, 200, 200, 333, 500))]
    with running(settings) as (cluster, _):

        def ask(prompt: list[int]) -> list[int]:
            body = {"prompt": prompt, "temperature": 0, "max_tokens": MAX_TOKENS, "ignore_eos": True}
            body |= {"model": cluster.model, "return_token_ids": True}
            answer = httpx.post(f"{cluster.url}/v1/completions", content=json.dumps(body), timeout=60)
            assert answer.status_code == 200, answer.text
            return list(answer.json()["choices"][0]["token_ids"])

        with ThreadPoolExecutor(len(prompts)) as threads:
            answers = list(threads.map(ask, prompts))
        assert metrics(cluster).total("baton:worker_transfers_received_total") >= len(prompts)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer) == MAX_TOKENS
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        lost = logits.max(-1).values - logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert float(lost.max()) <= 1e-3 * float(logits.std()), "not the likeliest"
    assert len({token for answer in answers for token in answer}) > 20, "a model that repeats itself shows nothing"
