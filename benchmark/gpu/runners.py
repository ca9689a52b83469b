"""Served runners on a GPU: a model's shape with random weights, over random KV; each says how long it took to make."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from itertools import product
from typing import NamedTuple

import torch

from baton.benchmark.harness.json_lines import JsonLines
from baton.benchmark.harness.shapes import SHAPES
from baton.kvtransfer.blocks.layout import KVLayout
from baton.kvtransfer.blocks.views import KvTensors, kv_tensors
from baton.models.check import recipe_for
from baton.models.config import ModelConfig
from baton.models.cuda.limits import StepLimits
from baton.models.cuda.memory import GIB, unit_padding
from baton.models.cuda.queue import CudaQueue
from baton.models.cuda.runner import CudaRunner
from baton.models.cuda.step_decoder import StepDecoder
from baton.models.fallback.config import described
from baton.models.folder import JsonObject
from baton.models.kv_format import KvFormat
from baton.models.kv_scales import kv_format_of
from baton.models.layer_weights import Weights
from baton.models.partition import Rank
from baton.models.quantization.recipe import RECIPES
from baton.models.weights import load_weights
from baton.worker.kv_layout import layout_of

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


KV_FORMATS = (PLAIN, "fp8", "fp8_static")


def add_quantization(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kv-dtype",
        default=PLAIN,
        help=f"formats of KV, comma separated, which take turns for each format of weights: {', '.join(KV_FORMATS)}",
    )
    parser.add_argument(
        "--quantization",
        default=PLAIN,
        help=f"formats of weights, comma separated, which take turns: {', '.join(QUANTIZATIONS)}",
    )


def given_formats(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Of weights and KV, all pairs."""
    return list(product(options.quantization.split(","), options.kv_dtype.split(",")))


def shape_config(shape: str) -> ModelConfig:
    """Of a folder of benchmark/shapes. NAME:8 is as wide as the part that one rank of 8 holds of it: its steps are the
    rank's, but for what ranks exchange."""
    name, _, count = shape.partition(":")
    config = ModelConfig.from_folder(SHAPES / name)
    if not count:
        return config
    rank = Rank(0, int(count))
    return replace(
        config,
        num_heads=len(rank.share(config.num_heads, "query heads")),
        num_kv_heads=len(rank.key_heads(config.num_kv_heads)),
        intermediate_size=len(rank.share(config.intermediate_size, "rows of an MLP")),
        vocab_size=len(rank.vocabulary(config.vocab_size)),
    )


def load_shape(lines: JsonLines, name: str, quantization: str = PLAIN) -> tuple[ModelConfig, Weights]:
    """quantization: of QUANTIZATIONS."""
    config = shape_config(name)
    recipe = recipe_for(None if quantization == PLAIN else quantization, config)
    before, began_at = torch.cuda.memory_allocated(), time.monotonic()
    weights = load_weights(
        config, SHAPES, torch.bfloat16, "cuda:0", "dummy", pack=False, recipe=recipe, keep_quantised=True
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


class RandomKv(NamedTuple):
    """A pool of random numbers, as zeros are quicker to compute with."""

    format: KvFormat
    layout: KVLayout
    tensors: KvTensors

    @property
    def num_blocks(self) -> int:
        return len(self.tensors.data)

    @property
    def key_bytes(self) -> float:
        """Of a key or value of one head, its scale included."""
        return self.layout.layer_bytes / (2 * self.layout.block_tokens)


def random_pool(
    config: ModelConfig, num_blocks: int, kv_dtype: str = PLAIN, device: str = "cuda:0", *, has_draft: bool = False
) -> RandomKv:
    """kv_dtype: of KV_FORMATS. has_draft: the KV of a draft is one more layer."""
    form = kv_format_of("auto" if kv_dtype == PLAIN else kv_dtype, config, SHAPES, torch.bfloat16, "dummy")
    layout = layout_of(config, form, BLOCK_TOKENS, has_draft=has_draft)
    layout = replace(layout, padding_bytes=unit_padding(layout.num_layers, layout.layer_bytes, layout.data_bytes))
    memory = torch.empty(num_blocks, layout.block_bytes, dtype=torch.uint8, device=device)
    some = torch.empty(min(256, num_blocks), layout.block_bytes, dtype=torch.uint8, device=device)
    data, scales = kv_tensors(some.view(-1), layout, len(some))
    numbers = torch.empty(data.shape, dtype=torch.bfloat16, device=device).normal_()
    data.copy_((numbers * 100).clamp(-448, 448) if form.quantised else numbers)  # a cast makes NaN of more
    if scales is not None:
        scales.fill_(0.01)
    for part in memory.split(len(some)):
        part.copy_(some[: len(part)])
    return RandomKv(form, layout, kv_tensors(memory.view(-1), layout, num_blocks))


def make_runners(
    lines: JsonLines,
    shape: str,
    formats: Sequence[tuple[str, str]],
    limits: StepLimits,
    num_blocks: int,
    longest: int,
) -> tuple[ModelConfig, dict[str, Weights], dict[tuple[str, str], tuple[RandomKv, CudaRunner]]]:
    """The shape's config, its weights by format, and a runner for each of the formats, of weights and of KV; those of
    one format have one memory for it."""
    config = shape_config(shape)
    weights = {name: load_shape(lines, shape, name)[1] for name in dict.fromkeys(of for of, _ in formats)}
    pools = {name: random_pool(config, num_blocks, name) for name in dict.fromkeys(of for _, of in formats)}
    return (
        config,
        weights,
        {
            (of_weights, of_kv): (
                pools[of_kv],
                make_runner(lines, config, weights[of_weights], limits, pools[of_kv], longest),
            )
            for of_weights, of_kv in formats
        },
    )


def make_fallback(lines: JsonLines, shape: str, limits: StepLimits, pool: RandomKv, longest: int) -> CudaRunner:
    """The shape with random weights through transformers, whatever runs it natively."""
    from baton.models.fallback.device_loader import load_on_device  # needs the library, which is optional

    folder, queue, began_at = SHAPES / shape, CudaQueue(0), time.monotonic()
    read = JsonObject.from_file(folder / "config.json")
    config = described(read, folder, f"{shape} by", f"transformers {version('transformers')}")
    most_tokens = max(limits.max_tokens, limits.max_rows)
    config, model = load_on_device(config, folder, torch.bfloat16, "dummy", queue, most_tokens, limits.max_rows)
    lines.put(
        "start",
        shape=shape,
        through=config.through,
        captured=model.captured,
        weights_s=round(time.monotonic() - began_at, 2),
    )
    return make_runner(lines, config, model, limits, pool, longest)


def make_runner(
    lines: JsonLines,
    config: ModelConfig,
    weights: Weights | StepDecoder,
    limits: StepLimits,
    pool: RandomKv,
    longest: int,
) -> CudaRunner:
    """Writes how long the capture took."""
    runner = CudaRunner(config, weights, CudaQueue(0), limits, longest, kv_format=pool.format)
    began_at = time.monotonic()
    captured = [0]
    data, scales = pool.tensors
    runner.bind_pool(data, longest, lambda done, _: captured.__setitem__(0, done), scales)
    runner.warm_up()
    lines.put("captured", graphs=captured[0], seconds=round(time.monotonic() - began_at, 1), limits=str(limits))
    return runner
