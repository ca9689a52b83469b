"""A rank of a worker on its GPU: its part of the model, the memory by which it exchanges, and the steps that it joins.

Rank 0's process owns the pools of all ranks, each on the GPU of its rank, so that transfers and digests are its alone.
The memory for exchanges is each rank's own; all map all of them. Until ranks know one another each captures its steps
alone (models.cuda.peers). Needs CUDA and triton.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from baton.kvtransfer.blocks import cudart
from baton.kvtransfer.blocks.device_pool import DeviceMemory, mapped
from baton.kvtransfer.blocks.layout import KVLayout
from baton.kvtransfer.blocks.views import KvTensors, kv_tensors
from baton.models.adapters.room import EXPERTS, LATENTS, MAGNITUDES, ROUTERS, VOCABULARY, WHOLES
from baton.models.config import ModelConfig
from baton.models.cuda.adapter_layout import BankLayout, BankShape, WholeShape
from baton.models.cuda.peers import DevicePeers, RankMemory
from baton.models.cuda.queue import CudaQueue
from baton.models.cuda.runner import CudaRunner
from baton.models.eagle_config import read_eagle
from baton.models.eagle_weights import load_eagle
from baton.models.kv_scales import kv_format_of
from baton.models.partition import Rank, check_partition, part_of
from baton.models.weights import Progress, no_progress
from baton.node.errors import InvariantBroken
from baton.worker.ranks.device_loading import DTYPES, config_of, device_layout, limits_of, load_on_gpu, room_for_blocks
from baton.worker.ranks.exchange import ProcessPeers
from baton.worker.ranks.following import Follower
from baton.worker.ranks.links import RankLink
from baton.worker.ranks.messages import DeviceLoaded, DevicePoolsMade, DeviceShare, ModelPart, RankStart, decode, encode


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
        (config, longest), dtype = config_of(start.model), DTYPES[start.model.dtype]
        check_partition(config, rank.count)
        weights = load_on_gpu(start.model, config, share.gpu, on_progress, rank)
        eagle, draft_bytes = None, 0
        if start.model.draft:
            eagle_config = read_eagle(Path(start.model.draft), config)
            draft = load_eagle(
                eagle_config, Path(start.model.draft), weights, start.model.load_format, pack=False, rank=rank
            )
            eagle, draft_bytes = (eagle_config, draft), draft.size_bytes
        torch.cuda.empty_cache()  # as behind the weights
        limits = limits_of(share, start.model)
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
        weights_bytes = sum(weights.size_bytes.values()) + draft_bytes
        return cls(rank, share, runner, peers, exchange, bank_memory, layout, weights_bytes, longest)

    @property
    def num_blocks(self) -> int:
        """For which this GPU has room, beside the contexts of this process and of rank 0's; 0: they are given."""
        apart_bytes = self.exchange.payload_bytes + (0 if self.bank is None else self.bank.payload_bytes)
        return room_for_blocks(self.share, self.layout.block_bytes, apart_bytes, is_worker=not self.rank.index)

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
    room = part.lora_room
    wholes = WholeShape.of(config, rank) if WHOLES in room else None
    layout = BankLayout.of(
        config,
        rank,
        vocabulary=VOCABULARY in room,
        latents=LATENTS in room,
        routers=ROUTERS in room,
        experts=EXPERTS in room,
    )
    return BankShape(layout, part.max_loras, part.max_lora_rank, dtype, wholes, MAGNITUDES in room)


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
