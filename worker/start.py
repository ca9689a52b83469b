"""Start-up of a worker: model, pool, planes, endpoint and carrier, made from settings and joined in one value.

It decides what makes KV compatible (the namespace) and how large the pool is, and says so in the log.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kvtransfer.blocks.events import EventLog
from kvtransfer.blocks.hashing import namespace_digest, tokenizer_fingerprint
from kvtransfer.blocks.layout import KVLayout
from kvtransfer.blocks.manager import BlockManager
from kvtransfer.blocks.pool import BlockPool
from kvtransfer.carrier import Carrier
from kvtransfer.exchange import Exchange
from kvtransfer.pairs import Wire
from kvtransfer.planes.base import Plane
from kvtransfer.planes.shm import ShmPlane
from kvtransfer.planes.zeromq import ZmqPlane
from kvtransfer.store.arena import HostCopies
from kvtransfer.store.client import NO_STORE, Store, StoreClient
from models.fingerprint import model_fingerprint
from models.runner import ModelRunner
from node.endpoint import Context, Endpoint, identity_of, new_context
from node.errors import SettingsError
from node.lifecycle import Membership
from node.messages import Register, Role
from node.modelhub import locate_model
from node.settings import require_loopback
from node.telemetry import log_event
from worker.settings import WorkerSettings

logger = logging.getLogger("worker")

PROGRESS_EVERY_S = 2.0


@dataclass(frozen=True, slots=True)
class Worker:
    """The parts that a role's loop works with."""

    identity: str
    runner: ModelRunner
    pool: BlockPool
    manager: BlockManager
    layout: KVLayout
    max_model_len: int
    carrier: Carrier
    store: Store

    def close(self) -> None:
        self.store.close()
        self.carrier.stop()
        self.pool.close()


def start(settings: WorkerSettings, role: Role) -> Worker:
    """Load the model, make the pool and join the proxies; raises SettingsError where that cannot be."""
    require_loopback(settings.bind, settings.insecure_network)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    folder = locate_model(settings.model)
    runner = ModelRunner.load(
        folder,
        dtype=settings.dtype,
        device=_device(settings.device),
        load_format=settings.load_format,
        on_progress=_progress_log(),
    )
    layout = KVLayout(
        num_layers=runner.config.num_layers,
        kv_heads=runner.config.num_kv_heads,
        head_dim=runner.config.head_dim,
        block_tokens=settings.block_tokens,
        dtype=str(runner.kv_dtype).removeprefix("torch."),
    )
    pool = BlockPool(layout, _pool_blocks(settings, layout), device=_device(settings.device))
    runner.bind_pool(pool.tensor)
    max_model_len = _max_model_len(settings, runner, layout, pool.num_blocks)
    namespace = _namespace(settings, folder, layout, runner)
    worker = settings.worker_id or f"{role}-{os.getpid()}"
    incarnation = time.time_ns() >> 10
    context = new_context()
    endpoint = Endpoint(context, identity_of(worker, incarnation), settings.bind)
    register = Register(
        worker=worker,
        incarnation=incarnation,
        role=role,
        model=folder.name,
        namespace=namespace,
        block_tokens=layout.block_tokens,
        total_blocks=pool.num_blocks,
        max_num_seqs=settings.max_num_seqs,
        max_model_len=max_model_len,
        address=endpoint.address,
    )
    links = {f"proxy@{address}": address for address in settings.proxy}
    for link, address in links.items():
        endpoint.connect(link, address)
    exchange = Exchange(
        endpoint.identity,
        namespace,
        _planes(settings.plane, pool, context, endpoint.identity, settings.bind),
        pool.digest,
        Wire(endpoint.send, endpoint.connect, endpoint.disconnect),
        chunk_blocks=max(1, int(settings.chunk_mib * (1 << 20)) // layout.block_bytes),
    )
    events = EventLog()
    membership = Membership(register, tuple(links), time.monotonic())
    carrier = Carrier(endpoint, membership, exchange, events)
    carrier.start()
    store: Store = NO_STORE
    if settings.store:
        copies = HostCopies(pool)
        inbox, on_store = carrier.inbox.put, membership.tell_store
        store = StoreClient(context, endpoint.identity, settings.store, namespace, copies, inbox, on_store)
    log_event(
        logger,
        "worker_started",
        worker=endpoint.identity,
        role=role,
        model=folder.name,
        dtype=layout.dtype,
        pool_blocks=pool.num_blocks,
        pool_mib=round(pool.num_blocks * layout.block_bytes / (1 << 20), 1),
        block_tokens=layout.block_tokens,
        max_model_len=max_model_len,
        threads=torch.get_num_threads(),
        address=endpoint.address,
        namespace=namespace.hex()[:12],
    )
    manager = BlockManager(pool.num_blocks, events.journal("gpu"))
    return Worker(endpoint.identity, runner, pool, manager, layout, max_model_len, carrier, store)


def _device(device: str) -> str:
    if device == "auto":
        return "cpu"  # until there are kernels for GPUs: the runner refuses other devices
    if device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device cuda: this torch sees no CUDA device")
    return device


def _pool_blocks(settings: WorkerSettings, layout: KVLayout) -> int:
    num_blocks = settings.num_blocks or int(settings.kv_memory_gib * (1 << 30)) // layout.block_bytes
    if num_blocks < 2:
        raise SettingsError(
            f"--kv-memory-gib {settings.kv_memory_gib}: a block of {layout.block_tokens} tokens takes "
            f"{layout.block_bytes} bytes, so the pool would have {num_blocks} blocks"
        )
    return num_blocks


def _max_model_len(settings: WorkerSettings, runner: ModelRunner, layout: KVLayout, num_blocks: int) -> int:
    """What the model knows, what was asked for and what the pool holds: the least of the three."""
    known = runner.config.max_position_embeddings
    if settings.max_model_len > known:
        raise SettingsError(f"--max-model-len {settings.max_model_len}: the model's positions end at {known}")
    return min(settings.max_model_len or known, num_blocks * layout.block_tokens)


def _namespace(settings: WorkerSettings, folder: Path, layout: KVLayout, runner: ModelRunner) -> bytes:
    model = model_fingerprint(folder) if settings.load_format == "auto" else hashlib.sha256(b"dummy").digest()
    return namespace_digest(
        model_fingerprint=model,
        layout=layout,
        weight_dtype=layout.dtype,
        tp_size=1,
        tp_rank=0,
        rope_fingerprint=hashlib.sha256(repr(runner.config.rope).encode()).digest(),
        tokenizer_fingerprint=tokenizer_fingerprint(folder),
    )


def _planes(names: Sequence[str], pool: BlockPool, context: Context, identity: str, bind: str) -> list[Plane]:
    """The planes by name, in the order of preference; one that this machine cannot offer is left out."""
    makers: dict[str, Callable[[], Plane]] = {
        "shm": lambda: ShmPlane(pool),
        "zmq": lambda: ZmqPlane(context, pool, identity, bind.rpartition(":")[0].removeprefix("tcp://")),
    }
    if unknown := [name for name in names if name not in makers]:
        raise SettingsError(f"--plane {unknown[0]}: there are {', '.join(makers)}")
    return [makers[name]() for name in names if name != "shm" or pool.shared is not None]


def _progress_log() -> Callable[[int, int], None]:
    """Called with (tensors loaded, tensors in all): a line every two seconds, none for what loads at once."""
    logged_at = time.monotonic()

    def on_progress(loaded: int, total: int) -> None:
        nonlocal logged_at
        if time.monotonic() - logged_at >= PROGRESS_EVERY_S:
            logged_at = time.monotonic()
            log_event(logger, "loading_weights", tensors=loaded, of=total)

    return on_progress
