"""python -m baton.worker.ranks FD: a rank of a worker other than rank 0. It joins steps until rank 0 ends.

FD: the open end of a link to rank 0, which says what to do. Not started by hand.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from baton.kvtransfer.blocks.memory import SharedFile, SharedReader
from baton.kvtransfer.blocks.views import kv_tensors
from baton.launch.supervisor import tether
from baton.models.cpu.runner import ModelRunner
from baton.models.partition import Rank
from baton.node.errors import InvariantBroken, PeerLost, SettingsError
from baton.node.garbage import freeze_startup_objects
from baton.node.telemetry import configure_logging, log_event
from baton.worker.build_cpu import layout_of
from baton.worker.ranks.exchange import ProcessPeers
from baton.worker.ranks.links import RankLink
from baton.worker.ranks.messages import BEAT_S, PoolMade, RankBeat, RankReady, RankStart, SharedBytes, decode, encode

START_S = 60.0
LOAD_S = 3600.0
"""Rank 0 loads at the same time."""

logger = logging.getLogger("rank")


def main(argv: Sequence[str]) -> int:
    control = RankLink.inherited(0, int(argv[0]))
    for number in (signal.SIGINT, signal.SIGTERM):  # for rank 0, whose requests get to their end
        signal.signal(number, signal.SIG_IGN)
    start = decode(control.receive(START_S))
    if not isinstance(start, RankStart):
        raise InvariantBroken(f"{type(start).__name__} before a rank knows what it is")
    if (tie := tether(start.starter_pid)) is not None:
        tie()
    configure_logging(start.log_level, start.name)
    torch.set_num_threads(start.threads)
    links = [RankLink.inherited(other, fd) for other, fd in start.peer_fds.items()]
    memory = torch.frombuffer(_mapped(start.starter_pid, start.memory).view, dtype=torch.uint8)
    peers = ProcessPeers(Rank(start.index, start.count), start.vocab_size, memory, links)
    try:
        join = _load(start, peers, control) if start.device is None else _load_on_device(start, peers, control)
        control.send(encode(RankReady()))
        threading.Thread(target=_beat, args=(control,), name="beat", daemon=True).start()
        log_event(logger, "rank_started", rank=start.index, of=start.count, pid=os.getpid())
        freeze_startup_objects()
        while True:
            join()
    except SettingsError as error:
        print(f"{start.name}: {error}", file=sys.stderr)
        return 1
    except PeerLost as error:
        log_event(logger, "rank_stopped", rank=start.index, reason=str(error))
        return 0


def _load_on_device(start: RankStart, peers: ProcessPeers, control: RankLink) -> Callable[[], None]:
    """The same on a GPU; needs CUDA and triton."""
    from baton.worker.ranks.device import join_on_device

    return join_on_device(start, peers, control, LOAD_S)


def _load(start: RankStart, peers: ProcessPeers, control: RankLink) -> Callable[[], None]:
    """This rank's part of the model over the pool of rank 0; what it gives is called for each step."""
    runner = ModelRunner.load(
        Path(start.folder),
        dtype=start.dtype,
        kv_dtype=start.kv_dtype,
        load_format=start.load_format,
        quantization=start.quantization,
        max_model_len=start.max_model_len,
        peers=peers,
    )
    made = decode(control.receive(LOAD_S))
    if not isinstance(made, PoolMade):
        raise InvariantBroken(f"{type(made).__name__} before a rank has a pool")
    flat = torch.frombuffer(_mapped(start.starter_pid, made.memory).view, dtype=torch.uint8)
    layout = layout_of(runner.config, runner.kv_format, made.block_tokens)
    runner.bind_pool(*kv_tensors(flat[: made.num_blocks * layout.block_bytes], layout, made.num_blocks))
    return lambda: runner.join(peers.begun())


def _mapped(pid: int, memory: SharedBytes) -> SharedReader:
    return SharedReader(pid, SharedFile(memory.fd, memory.size_bytes, memory.nonce), writable=True)


def _beat(control: RankLink) -> None:
    """Until rank 0 is gone: the exchange of the next step says so too."""
    while True:
        try:
            control.send(encode(RankBeat()))
        except PeerLost:
            return
        time.sleep(BEAT_S)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
