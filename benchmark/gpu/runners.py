"""Served runners on a GPU: a model's shape with random weights, over random KV; each says how long it took to make."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch

from baton.benchmark.harness.json_lines import JsonLines
from baton.benchmark.harness.shapes import SHAPES
from baton.models.check import recipe_for
from baton.models.config import ModelConfig
from baton.models.cuda.memory import GIB, unit_padding
from baton.models.cuda.queue import CudaQueue
from baton.models.cuda.runner import CudaRunner, StepLimits
from baton.models.layers import Weights
from baton.models.quantization.recipe import RECIPES
from baton.models.weights import load_weights

BLOCK_TOKENS = 64


def chat_lengths(count: int) -> list[int]:
    """Context lengths of up to 256 chats, in tokens: log-normal, median 665, 48 to 16000."""
    if not 0 < count <= 256:
        raise ValueError(f"{count} chats: must be 1 to 256")
    drawn = torch.randn(256, generator=torch.Generator().manual_seed(0)) + 6.5
    lengths: list[int] = drawn.exp().clamp(max=16000).int().tolist()
    return lengths[:count]


PLAIN = "bf16"
QUANTIZATIONS = (PLAIN, *RECIPES)


def add_quantization(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quantization",
        default=PLAIN,
        help=f"formats of weights, comma separated, which take turns: {', '.join(QUANTIZATIONS)}",
    )


def load_shape(lines: JsonLines, name: str, quantization: str = PLAIN) -> tuple[ModelConfig, Weights]:
    """quantization: of QUANTIZATIONS."""
    folder = SHAPES / name
    config = ModelConfig.from_folder(folder)
    recipe = recipe_for(None if quantization == PLAIN else quantization, config)
    before, began_at = torch.cuda.memory_allocated(), time.monotonic()
    weights = load_weights(
        config, folder, torch.bfloat16, "cuda:0", "dummy", pack=False, recipe=recipe, keep_quantised=True
    )
    torch.cuda.synchronize()
    lines.put(
        "start",
        shape=name,
        quantization=quantization,
        weights_gib=round((torch.cuda.memory_allocated() - before) / GIB, 2),
        gpu=torch.cuda.get_device_name(),
        torch=torch.__version__,
        weights_s=round(time.monotonic() - began_at, 2),
    )
    return config, weights


def random_pool(config: ModelConfig, num_blocks: int) -> torch.Tensor:
    """[num_blocks, KH, layers, 2, block_tokens, D]; random, as zeros are quicker to compute with."""
    layer = 2 * BLOCK_TOKENS * config.head_dim
    unit = config.num_layers * layer + unit_padding(config.num_layers, layer, layer)
    memory = torch.empty(num_blocks, config.num_kv_heads, unit, dtype=torch.bfloat16, device="cuda:0")
    some = torch.empty(256, *memory.shape[1:], dtype=torch.bfloat16, device="cuda:0").normal_()
    for part in memory.split(len(some)):
        part.copy_(some[: len(part)])
    layers = memory[:, :, : config.num_layers * layer]
    return layers.unflatten(2, (config.num_layers, 2, BLOCK_TOKENS, config.head_dim))


def make_runners(
    lines: JsonLines, shape: str, quantizations: Sequence[str], limits: StepLimits, num_blocks: int, longest: int
) -> tuple[ModelConfig, torch.Tensor, dict[str, CudaRunner]]:
    """Of the shape with weights in each of the formats, all over one random pool."""
    config = ModelConfig.from_folder(SHAPES / shape)
    weights = {name: load_shape(lines, shape, name)[1] for name in quantizations}
    pool = random_pool(config, num_blocks)
    runners = {name: make_runner(lines, config, each, limits, pool, longest) for name, each in weights.items()}
    return config, pool, runners


def make_runner(
    lines: JsonLines, config: ModelConfig, weights: Weights, limits: StepLimits, pool: torch.Tensor, longest: int
) -> CudaRunner:
    """Writes how long the capture took."""
    runner = CudaRunner(config, weights, CudaQueue(0), limits, longest)
    began_at = time.monotonic()
    captured = [0]
    runner.bind_pool(pool, longest, lambda done, _: captured.__setitem__(0, done))
    runner.warm_up()
    lines.put("captured", graphs=captured[0], seconds=round(time.monotonic() - began_at, 1), limits=str(limits))
    return runner
