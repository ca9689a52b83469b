"""What the process of a rank or a stage loads on its GPU, and how many blocks that leaves room for. Needs CUDA."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path

import torch

from baton.kvtransfer.blocks.layout import KVLayout
from baton.models.check import longest_known, recipe_for
from baton.models.config import ModelConfig
from baton.models.cuda.limits import StepLimits, room_limits
from baton.models.cuda.memory import CONTEXT_BYTES, GIB, GpuMemory, plan_blocks, unit_padding
from baton.models.fallback.config import model_config
from baton.models.kv_format import KvFormat
from baton.models.layer_weights import Weights
from baton.models.partition import ONLY_STAGE, WHOLE, Rank, Stage
from baton.models.weights import Progress, load_weights
from baton.node.telemetry import log_event
from baton.worker.kv_layout import layout_of
from baton.worker.ranks.messages import DeviceShare, ModelPart

logger = logging.getLogger("ranks")

DTYPES = {"auto": torch.bfloat16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def config_of(part: ModelPart) -> tuple[ModelConfig, int]:
    """Of the whole model, up to the longest sequence that is computed; and its tokens."""
    config = model_config(Path(part.folder))
    longest = longest_known(part.max_model_len, config)
    return config.up_to(longest), longest


def load_on_gpu(
    part: ModelPart,
    config: ModelConfig,
    gpu: int,
    on_progress: Progress,
    rank: Rank = WHOLE,
    stage: Stage = ONLY_STAGE,
) -> Weights:
    """That rank's, or that stage's; SettingsError for what cannot run."""
    began_at = time.monotonic()
    weights = load_weights(
        config,
        Path(part.folder),
        DTYPES[part.dtype],
        f"cuda:{gpu}",
        part.load_format,
        on_progress,
        pack=False,
        rank=rank,
        recipe=recipe_for(part.quantization, config),
        keep_quantised=True,
        stage=stage,
    )
    torch.cuda.empty_cache()  # what tensors took on their way is not the model's
    sizes_bytes = weights.size_bytes
    log_event(
        logger,
        "weights_loaded",
        rank=rank.index,
        stage=stage.index,
        took_s=round(time.monotonic() - began_at, 1),
        weights_gib=round(sum(sizes_bytes.values()) / GIB, 1),
        formats=",".join(f"{name}:{round(size / GIB, 1)}" for name, size in sorted(sizes_bytes.items())),
    )
    return weights


def limits_of(share: DeviceShare, part: ModelPart) -> StepLimits:
    return StepLimits(
        share.max_num_seqs,
        share.max_num_batched_tokens,
        share.run_ahead,
        share.deterministic,
        most_drafts=share.most_drafts,
        adapter_slots=part.max_loras,
        max_rank=part.max_lora_rank,
        **room_limits(part.lora_room),
    )


def room_for_blocks(share: DeviceShare, block_bytes: int, apart_bytes: int, *, is_worker: bool) -> int:
    """Beside what the process has allocated, apart_bytes of it elsewhere than through torch, and the contexts of this
    process and of the worker's, which has the pool; 0: the number of blocks is given."""
    if share.gpu_memory_utilization is None:
        return 0
    free_bytes, total_bytes = torch.cuda.mem_get_info(share.gpu)
    own_bytes = torch.cuda.memory_reserved(share.gpu) + apart_bytes + (0 if is_worker else CONTEXT_BYTES)
    return plan_blocks(GpuMemory(total_bytes, free_bytes, own_bytes), share.gpu_memory_utilization, block_bytes)


def device_layout(config: ModelConfig, kv_format: KvFormat, block_tokens: int, *, has_draft: bool = False) -> KVLayout:
    """As a GPU's pool has it."""
    layout = layout_of(config, kv_format, block_tokens, has_draft=has_draft)
    return replace(layout, padding_bytes=padding_of(layout))


def padding_of(layout: KVLayout) -> int:
    """Bytes behind each unit of a GPU's pool of this layout."""
    return unit_padding(layout.num_layers, layout.layer_bytes, layout.data_bytes)
