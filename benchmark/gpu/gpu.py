"""What bench_decode and bench_prefill share: a model's shape with random weights, on a GPU, over random KV."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch

from baton.models.config import ModelConfig
from baton.models.cuda.memory import spread_layers
from baton.models.cuda.queue import CudaQueue
from baton.models.cuda.runner import CudaRunner, Limits
from baton.models.weights import Weights, load_weights

SHAPES = Path(__file__).resolve().parents[1] / "shapes"
BLOCK_TOKENS = 64


def chat_lengths(count: int) -> list[int]:
    """Tokens of up to 256 sequences as they come together when people chat: log-normal, median 665, 48 to 16000."""
    if not 0 < count <= 256:
        raise ValueError(f"chats of {count} sequences; 1 to 256 are drawn")
    drawn = torch.randn(256, generator=torch.Generator().manual_seed(0)) + 6.5
    lengths: list[int] = drawn.exp().clamp(max=16000).int().tolist()
    return lengths[:count]


def line(**values: object) -> None:
    print(json.dumps(values), flush=True)


def load_shape(name: str) -> tuple[ModelConfig, Weights]:
    folder = SHAPES / name
    config = ModelConfig.from_folder(folder)
    began_at = time.monotonic()
    weights = load_weights(config, folder, torch.bfloat16, "cuda:0", "dummy", pack=False)
    torch.cuda.synchronize()
    line(
        what="start",
        shape=name,
        gpu=torch.cuda.get_device_name(),
        torch=torch.__version__,
        weights_s=round(time.monotonic() - began_at, 2),
    )
    return config, weights


def random_pool(config: ModelConfig, num_blocks: int) -> torch.Tensor:
    """[num_blocks, layers, 2, block_tokens, KH, D]; zeros would be quicker to compute with than what is served."""
    shape = (num_blocks, spread_layers(config.num_layers), 2, BLOCK_TOKENS, config.num_kv_heads, config.head_dim)
    pool = torch.empty(shape, dtype=torch.bfloat16, device="cuda:0")
    some = torch.empty(256, *shape[1:], dtype=torch.bfloat16, device="cuda:0").normal_()
    for part in pool.split(len(some)):
        part.copy_(some[: len(part)])
    return pool


def make_runner(config: ModelConfig, weights: Weights, limits: Limits, pool: torch.Tensor, longest: int) -> CudaRunner:
    """Tells how long the capture took."""
    runner = CudaRunner(config, weights, CudaQueue(0), limits, longest)
    began_at = time.monotonic()
    captured = [0]
    runner.bind_pool(pool, longest, lambda done, _: captured.__setitem__(0, done))
    runner.warm_up()
    line(what="captured", graphs=captured[0], seconds=round(time.monotonic() - began_at, 1), limits=str(limits))
    return runner
