"""A rank of a worker on its GPU: its part of the model, the memory by which it exchanges, and the steps that it joins.

Rank 0's process owns the pools of all ranks, each on the GPU of its rank, so that transfers and digests are its alone.
The memory for exchanges is each rank's own; all map all of them. Until ranks know one another each captures its steps
alone (models.cuda.peers). Needs CUDA and triton.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from baton.kvtransfer.blocks import cudart
from baton.kvtransfer.blocks.device_pool import DeviceMemory, mapped
from baton.kvtransfer.blocks.layout import KVLayout
from baton.kvtransfer.blocks.views import KvTensors, kv_tensors
from baton.models.check import longest_known, recipe_for
from baton.models.config import ModelConfig
from baton.models.cuda.adapter_layout import BankLayout, BankShape, WholeShape
from baton.models.cuda.limits import StepLimits
from baton.models.cuda.memory import CONTEXT_BYTES, GIB, GpuMemory, plan_blocks, unit_padding
from baton.models.cuda.peers import DevicePeers, RankMemory
from baton.models.cuda.queue import CudaQueue
from baton.models.cuda.runner import CudaRunner
from baton.models.eagle_config import read_eagle
from baton.models.eagle_weights import load_eagle
from baton.models.fallback.config import model_config
from baton.models.kv_format import KvFormat
from baton.models.kv_scales import kv_format_of
from baton.models.partition import Rank, check_partition, part_of
from baton.models.weights import Progress, load_weights, no_progress
from baton.node.errors import InvariantBroken
from baton.node.telemetry import log_event
from baton.worker.kv_layout import layout_of
from baton.worker.ranks.exchange import ProcessPeers
from baton.worker.ranks.following import Follower
from baton.worker.ranks.links import RankLink
from baton.worker.ranks.messages import DeviceLoaded, DevicePoolsMade, DeviceShare, ModelPart, RankStart, decode, encode

logger = logging.getLogger("ranks")

DTYPES = {"auto": torch.bfloat16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class DeviceRank:
    """One rank's part of a model on its GPU."""

    rank: Rank
    share: DeviceShare
    runner: CudaRunner
    peers: DevicePeers
    exchange: DeviceMemory
    bank: DeviceMemory | None
    """Of the slots of adapters."""
    layout: KVLayout
    """Of this rank's pool."""
    weights_bytes: int
    longest: int

    @classmethod
    def load(cls, start: RankStart, on_progress: Progress = no_progress) -> DeviceRank:
        """SettingsError for what cannot run."""
        share, rank, folder = start.device, Rank(start.index, start.count), Path(start.model.folder)
        if share is None:
            raise InvariantBroken("a rank on a GPU without its share of one")
        torch.cuda.set_device(share.gpu)
        config = model_config(folder)
        check_partition(config, rank.count)
        longest = longest_known(start.model.max_model_len, config)
        config = config.up_to(longest)
        began_at, dtype = time.monotonic(), DTYPES[start.model.dtype]
        weights = load_weights(
            config,
            folder,
            dtype,
            f"cuda:{share.gpu}",
            start.model.load_format,
            on_progress,
            pack=False,
            rank=rank,
            recipe=recipe_for(start.model.quantization, config),
            keep_quantised=True,
        )
        eagle, draft_bytes = None, 0
        if start.model.draft:
            eagle_config = read_eagle(Path(start.model.draft), config)
            draft = load_eagle(
                eagle_config, Path(start.model.draft), weights, start.model.load_format, pack=False, rank=rank
            )
            eagle, draft_bytes = (eagle_config, draft), draft.size_bytes
        torch.cuda.empty_cache()  # what tensors took on their way is not the model's
        sizes_bytes = weights.size_bytes
        log_event(
            logger,
            "weights_loaded",
            rank=rank.index,
            took_s=round(time.monotonic() - began_at, 1),
            weights_gib=round(sum(sizes_bytes.values()) / GIB, 1),
            formats=",".join(f"{name}:{round(size / GIB, 1)}" for name, size in sorted(sizes_bytes.items())),
        )
        limits = StepLimits(
            share.max_num_seqs,
            share.max_num_batched_tokens,
            share.run_ahead,
            share.deterministic,
            most_drafts=share.most_drafts,
            adapter_slots=start.model.max_loras,
            max_rank=start.model.max_lora_rank,
            adapter_vocabulary=start.model.lora_vocabulary,
            adapter_wholes=start.model.lora_modules_to_save,
            adapter_routers=start.model.lora_routers,
            adapter_experts=start.model.lora_experts,
            adapter_magnitudes=start.model.lora_dora,
        )
        exchanged = RankMemory.of(config, rank, dtype, limits.max_tokens)
        exchange = DeviceMemory(1, exchanged.size_bytes, share.gpu)
        peers = DevicePeers(exchanged, exchange.data.view(-1), config.vocab_size)
        bank = bank_shape(config, rank, start.model, dtype)
        bank_memory = None if bank is None else DeviceMemory(1, bank.size_bytes, share.gpu)
        kv_format = kv_format_of(start.model.kv_dtype, config, folder, dtype, start.model.load_format)
        runner = CudaRunner(
            config,
            weights,
            CudaQueue(share.gpu),
            limits,
            longest,
            kv_format=kv_format,
            peers=peers,
            eagle=eagle,
            bank_memory=None if bank_memory is None else bank_memory.data.view(-1),
        )
        layout = device_layout(part_of(config, rank), kv_format, share.block_tokens, has_draft=eagle is not None)
        weights_bytes = sum(sizes_bytes.values()) + draft_bytes
        return cls(rank, share, runner, peers, exchange, bank_memory, layout, weights_bytes, longest)

    @property
    def num_blocks(self) -> int:
        """For which this GPU has room, beside the contexts of this process and of rank 0's; 0: they are given."""
        if self.share.gpu_memory_utilization is None:
            return 0
        free_bytes, total_bytes = torch.cuda.mem_get_info(self.share.gpu)
        others = CONTEXT_BYTES if self.rank.index else 0
        apart_bytes = self.exchange.payload_bytes + (0 if self.bank is None else self.bank.payload_bytes)
        own_bytes = torch.cuda.memory_reserved(self.share.gpu) + apart_bytes + others
        memory = GpuMemory(total_bytes, free_bytes, own_bytes)
        return plan_blocks(memory, self.share.gpu_memory_utilization, self.layout.block_bytes)

    def bind(self, tensors: KvTensors, max_model_len: int, on_progress: Progress = no_progress) -> None:
        """Steps use this pool, and are captured; the others take no part yet."""
        self.runner.bind_pool(tensors.data, max_model_len, on_progress, tensors.scales)
        self.runner.warm_up()

    def connect(self, exchanges: Sequence[bytes]) -> None:
        """Exchange with the others from now on; handles of all ranks."""
        cudart.use_device(self.share.gpu)
        self.peers.connect(
            [
                self.exchange.pointer if index == self.rank.index else cudart.open_handle(handle)
                for index, handle in enumerate(exchanges)
            ]
        )


def bank_shape(config: ModelConfig, rank: Rank, part: ModelPart, dtype: torch.dtype) -> BankShape | None:
    """Of the slots of adapters of a rank; None: there are none."""
    if not part.max_loras:
        return None
    wholes = WholeShape.of(config, rank) if part.lora_modules_to_save else None
    layout = BankLayout.of(
        config, rank, vocabulary=part.lora_vocabulary, routers=part.lora_routers, experts=part.lora_experts
    )
    return BankShape(layout, part.max_loras, part.max_lora_rank, dtype, wholes, part.lora_dora)


def device_layout(config: ModelConfig, kv_format: KvFormat, block_tokens: int, *, has_draft: bool = False) -> KVLayout:
    """As a GPU's pool has it."""
    layout = layout_of(config, kv_format, block_tokens, has_draft=has_draft)
    return replace(layout, padding_bytes=unit_padding(layout.num_layers, layout.layer_bytes, layout.data_bytes))


def join_on_device(
    start: RankStart, peers: ProcessPeers, control: RankLink, load_s: float
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Load a rank other than 0 and make it ready; what is called for each record, and what ends waits for others."""
    loaded = DeviceRank.load(start)
    bank = b"" if loaded.bank is None else loaded.bank.handle
    control.send(encode(DeviceLoaded(exchange=loaded.exchange.handle, bank=bank, num_blocks=loaded.num_blocks)))
    made = decode(control.receive(load_s))
    if not isinstance(made, DevicePoolsMade):
        raise InvariantBroken(f"{type(made).__name__} before a rank has a pool")
    size_bytes = made.num_blocks * loaded.layout.block_bytes
    memory = mapped(made.pools[start.index], size_bytes, loaded.share.gpu)
    loaded.bind(kv_tensors(memory, loaded.layout, made.num_blocks), made.max_model_len)
    loaded.connect(made.exchanges)
    follower = Follower(loaded.runner.launch_chosen, loaded.runner.run_ahead)
    return lambda: follower.take(peers.hear()), loaded.peers.give_up
