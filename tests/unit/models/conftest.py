"""Tiny random models of each family, made by transformers itself, and the rows that run them."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers

from baton.kvtransfer.blocks.views import KvTensors, kv_tensors
from baton.models.batch import Draw, Row
from baton.models.cpu.runner import ModelRunner
from baton.node.messages.control import SamplingSpec
from baton.worker.kv_layout import layout_of

CONFIGS = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM),
    "qwen2_moe": (transformers.Qwen2MoeConfig, transformers.Qwen2MoeForCausalLM),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    "deepseek_v2": (transformers.DeepseekV2Config, transformers.DeepseekV2ForCausalLM),
    "deepseek_v3": (transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM),
    "glm4_moe": (transformers.Glm4MoeConfig, transformers.Glm4MoeForCausalLM),
    "olmoe": (transformers.OlmoeConfig, transformers.OlmoeForCausalLM),
    "gpt_oss": (transformers.GptOssConfig, transformers.GptOssForCausalLM),
    "phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM),
    "gemma": (transformers.GemmaConfig, transformers.GemmaForCausalLM),
    "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
    "gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
}
SHAPE = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "eos_token_id": 7,
}
LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 2,
    "topk_group": 1,
}
"""Of latent attention, and of experts behind the first layer."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@dataclass(frozen=True)
class Made:
    folder: Path
    reference: transformers.PreTrainedModel


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Made]:
    """make_model(family, shard_size=..., **config) saves a random model; gives its folder and transformers' own."""

    def make(family: str, shard_size: str = "5GB", **config: object) -> Made:
        config_class, model_class = CONFIGS[family]
        torch.manual_seed(11)
        made = config_class(**SHAPE | config)
        made._attn_implementation = "eager"  # the one that has softcaps
        model = model_class(made).eval()
        for name, parameter in model.named_parameters():
            # Large and everywhere non-zero, biases and norms too: logits far apart, and no part that could be left out.
            spread = torch.randn_like(parameter) * 0.2
            parameter.data = 1 + spread if "norm" in name else spread
        for name, buffer in model.named_buffers():
            if "correction" in name:
                buffer.copy_(torch.randn_like(buffer) * 0.2)
        model.save_pretrained(tmp_path, max_shard_size=shard_size)
        return Made(tmp_path, model)

    return make


def edit_config(folder: Path, **fields: object) -> None:
    """Sets keys of config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.fixture(name="edit_config")
def edit_config_fixture() -> Callable[..., None]:
    return edit_config


GREEDY = Draw(SamplingSpec(max_tokens=1000, temperature=0.0), (), 0, 0)


def kv_pool(runner: ModelRunner, num_blocks: int, block_tokens: int) -> KvTensors:
    """Zeroed memory for the runner's KV."""
    layout = layout_of(runner.config, runner.kv_format, block_tokens)
    return kv_tensors(torch.zeros(num_blocks * layout.block_bytes, dtype=torch.uint8), layout, num_blocks)


class Sequences:
    """Runs whole sequences on a runner, each over its own shuffled blocks."""

    def __init__(self, runner: ModelRunner, num_sequences: int, max_tokens: int, block_tokens: int = 16) -> None:
        self.runner = runner
        width = -(-max_tokens // block_tokens)
        self.pool = kv_pool(runner, width * num_sequences + 3, block_tokens)
        runner.bind_pool(*self.pool)
        shuffled = torch.randperm(len(self.pool.data), generator=torch.Generator().manual_seed(5)).tolist()
        self.tables = [shuffled[index * width : (index + 1) * width] for index in range(num_sequences)]

    def chunks(self, index: int, tokens: list[int], size: int) -> list[Row]:
        """The prompt's rows in pieces of `size`; only the last draws."""
        starts = range(0, len(tokens), size)
        return [
            Row(tokens[s : s + size], s, self.tables[index], GREEDY if s + size >= len(tokens) else None)
            for s in starts
        ]

    def greedy(self, index: int, prompt: list[int], count: int, chunk: int = 10_000) -> tuple[list[int], torch.Tensor]:
        """`count` greedy tokens after the prompt, and the float32 logits [count, vocab] that each was drawn from."""
        known, logits = list(prompt), []
        rows = self.chunks(index, prompt, chunk)
        for row in rows[:-1]:
            assert self.runner.step([row]) == [None]
        row = rows[-1]
        for _ in range(count):
            logits.append(self.runner.compute([row])[1][0])
            known.append(int(logits[-1].argmax()))
            row = Row((known[-1],), len(known) - 1, self.tables[index], GREEDY)
        return known[len(prompt) :], torch.stack(logits)


@pytest.fixture
def sequences() -> type[Sequences]:
    return Sequences


@pytest.fixture
def prompt() -> list[int]:
    return torch.randint(0, SHAPE["vocab_size"], (37,), generator=torch.Generator().manual_seed(3)).tolist()
