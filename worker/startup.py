"""Start-up of a worker: model, pool, planes, endpoint and I/O thread, made from settings and joined in one value.

It decides what makes KV compatible (the namespace) and how large the pool is, and says so in the log.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from baton.kvtransfer.blocks.events import EventLog
from baton.kvtransfer.blocks.hashing import namespace_digest, tokenizer_fingerprint
from baton.kvtransfer.blocks.layout import KVLayout
from baton.kvtransfer.blocks.manager import BlockManager
from baton.kvtransfer.protocol.exchange import ChunkLimits, TransferExchange
from baton.kvtransfer.protocol.pairs import PeerTransport
from baton.kvtransfer.protocol.transfer import Timing
from baton.kvtransfer.store.client import NO_STORE, Store, StoreClient
from baton.models.adapters.base_rows import rows_of_folder, unknown_rows
from baton.models.adapters.fills import PreparedAdapter
from baton.models.adapters.peft import read_adapter
from baton.models.check import recipe_for
from baton.models.config import ModelConfig
from baton.models.fallback.config import model_config
from baton.models.fingerprint import FingerprintTask
from baton.node.addresses import listen_host
from baton.node.credentials import PAIRED_WITH, link_credentials
from baton.node.endpoint import Endpoint, identity_of
from baton.node.host import default_name
from baton.node.membership import Membership
from baton.node.messages.base import Role
from baton.node.messages.control import Register
from baton.node.modelhub import locate_model
from baton.node.sockets import Context
from baton.node.telemetry import log_event
from baton.worker.adapter_slots import AdapterRead
from baton.worker.adapters import WorkerAdapters
from baton.worker.build_cpu import KvPool, LoadedModel, load_model
from baton.worker.grammar_tokenizer import loading_grammar_tokenizer
from baton.worker.grammars import LIBRARY, GrammarCompiler
from baton.worker.io_thread import IoThread
from baton.worker.parts import NO_ADAPTERS, Parts
from baton.worker.prefix_loading import PrefixLoader
from baton.worker.ranks.members import Ranks
from baton.worker.settings import WorkerSettings

logger = logging.getLogger("worker")

PULLED = 4
"""So many times --chunk-mib are one chunk between two GPUs where the receiver pulls. The KV of a prompt of 2048 tokens
of an 8B model is one chunk then: messages take longer than its bytes."""


@dataclass(frozen=True, slots=True)
class StartedWorker:
    """The parts for a loop, and what is closed after it."""

    parts: Parts
    pool: KvPool
    store: Store
    io: IoThread
    grammars: GrammarCompiler
    ranks: Ranks
    adapters: WorkerAdapters | None

    def close(self) -> None:
        if self.adapters is not None:
            self.adapters.close()
        self.grammars.close()
        self.store.close()
        self.io.stop()
        self.ranks.close()
        self.pool.close()


def start(settings: WorkerSettings, device: str, role: Role) -> StartedWorker:
    """Load the model, make the pool and join the proxies; raises SettingsError where that cannot be."""
    host = listen_host(settings.bind, settings.advertise_host)
    credentials = link_credentials(role, settings.secret_file, settings.insecure_network)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    folder = locate_model(settings.model, logger.info)
    config = model_config(folder)
    sizes = settings.worker_sizes(device, config.full_step_tokens)
    tokens = loading_grammar_tokenizer(folder / "tokenizer.json", config.vocab_size, config.eos_token_ids)
    recipe = recipe_for(settings.quantization, config)
    draft = None if settings.draft_model is None else locate_model(settings.draft_model, logger.info)
    with ExitStack() as stack:
        tokenizer = stack.enter_context(tokens)
        hashing = stack.enter_context(FingerprintTask(folder, settings.load_format, device, recipe))
        of_draft = None
        if draft is not None:
            of_draft = stack.enter_context(FingerprintTask(draft, settings.load_format, device))
        model = load_model(settings, sizes, device, role, folder, draft)
        began_at = time.monotonic()
        fingerprint = hashing.result()
        if of_draft is not None:
            fingerprint = with_draft(fingerprint, of_draft.result())
    model.check_weights(fingerprint)
    log_event(logger, "weights_hashed", waited_s=round(time.monotonic() - began_at, 1))
    if model.config.rope.kind == "longrope":
        log_event(logger, "longrope", factors="long" if model.config.rope.use_long_factors else "short")
    layout, num_blocks = model.layout, model.pool.num_blocks
    namespace = namespace_of(folder, fingerprint, layout, model.dtype, model.config)
    worker = settings.worker_id or default_name(role)
    incarnation = time.time_ns() >> 10
    context = Context(credentials)
    endpoint = Endpoint(context, identity_of(worker, incarnation), settings.bind)
    register = Register(
        worker=worker,
        incarnation=incarnation,
        role=role,
        model=folder.name,
        namespace=namespace,
        block_tokens=layout.block_tokens,
        total_blocks=num_blocks,
        max_num_seqs=sizes.max_num_seqs,
        max_model_len=model.max_model_len,
        address=host.advertise(endpoint.address),
        grammar=LIBRARY,
        max_loras=model.adapter_slots.num_slots,
        max_lora_rank=settings.max_lora_rank if model.adapter_slots.num_slots else 0,
        revision=settings.revision,
    )
    links = {f"proxy@{address}": address for address in settings.proxy}
    for link, address in links.items():
        endpoint.connect(link, address, "proxy")
    chunk_blocks = max(1, int(sizes.chunk_mib * (1 << 20)) // layout.block_bytes)
    exchange = TransferExchange(
        endpoint.identity,
        namespace,
        model.make_planes(context, endpoint.identity, host),
        model.pool.digests,
        PeerTransport(endpoint.send, partial(endpoint.connect, role=PAIRED_WITH[role]), endpoint.disconnect),
        ChunkLimits(chunk_blocks, pulled_blocks=chunk_blocks * (PULLED if device == "cuda" else 1)),
        Timing(poll_s=model.poll_s),
    )
    events = EventLog()
    membership = Membership(register, tuple(links), time.monotonic())
    io = IoThread(endpoint, membership, exchange, events)
    io.start()
    model.ranks.watch(io.inbox.put)
    store: Store = NO_STORE
    if settings.store and model.host_copies is not None:
        copies, inbox, on_store = model.host_copies, io.inbox.put, membership.set_store
        store = StoreClient(context, endpoint.identity, settings.store, namespace, copies, inbox, on_store)
    log_event(
        logger,
        "worker_started",
        worker=endpoint.identity,
        role=role,
        model=folder.name,
        ranks=settings.tp,
        stages=settings.pp,
        dtype=model.dtype,
        kv_dtype=layout.dtype,
        device=device,
        pool_blocks=num_blocks,
        pool_mib=round(num_blocks * layout.block_bytes / (1 << 20), 1),
        block_tokens=layout.block_tokens,
        max_model_len=model.max_model_len,
        threads=torch.get_num_threads(),
        address=register.address,
        namespace=namespace.hex()[:12],
    )
    adapters = _adapters(settings, folder, model, io.inbox.put)
    grammars = GrammarCompiler(tokenizer, model.config.vocab_size, io.inbox.put)
    manager = BlockManager(num_blocks, events.journal("gpu"))
    parts = Parts(
        runner=model.runner,
        manager=manager,
        layout=layout,
        max_model_len=model.max_model_len,
        io=io,
        prefixes=PrefixLoader(store, manager, layout, always=settings.store_loads == "always"),
        checksums=model.checksums,
        grammars=grammars,
        adapters=adapters or NO_ADAPTERS,
    )
    return StartedWorker(parts, model.pool, store, io, grammars, model.ranks, adapters)


def _adapters(
    settings: WorkerSettings, folder: Path, model: LoadedModel, on_read: Callable[[AdapterRead], None]
) -> WorkerAdapters | None:
    """None where the runner takes none."""
    slots, config = model.adapter_slots, model.config
    if not slots.num_slots:
        return None
    made_up = settings.load_format == "dummy"
    base_rows = unknown_rows if made_up else rows_of_folder(folder, config.tie_word_embeddings)

    def read(path: Path) -> tuple[bytes, PreparedAdapter]:
        adapter = read_adapter(path, config, base_rows)
        return adapter.digest, slots.prepare(adapter)

    return WorkerAdapters(slots, read, settings.max_cpu_loras, on_read)


def with_draft(fingerprint: bytes, draft: bytes) -> bytes:
    """The fingerprint of a model whose blocks hold the KV of this draft too."""
    return hashlib.sha256(b"baton-draft-1\0" + fingerprint + draft).digest()


def namespace_of(folder: Path, fingerprint: bytes, layout: KVLayout, dtype: str, config: ModelConfig) -> bytes:
    """Digest of all that makes KV compatible: two workers of different namespaces never exchange blocks.

    dtype: of what is computed; the layout names that of KV, and what its scales are.
    """
    quantization = config.quantization
    through = f" through {config.through}" if config.through else ""  # it rounds in another order
    return namespace_digest(
        model_fingerprint=fingerprint,
        layout=layout,
        weight_dtype=f"{dtype if quantization is None else f'{quantization.method} as {dtype}'}{through}",
        rope_fingerprint=hashlib.sha256(repr((config.rope, config.window_rope)).encode()).digest(),
        tokenizer_fingerprint=tokenizer_fingerprint(folder),
    )
