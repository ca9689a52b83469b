"""The other processes of a worker, whatever they do for it: started, given the pool, watched, and ended.

A process's death closes its link, and one that is frozen sends no beats: both are noticed within LOST_S, also in the
middle of a step, and are the death of the worker. The others belong to the worker's process group, and leave signals to
it.
"""

from __future__ import annotations

import logging
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol, TypeVar

from baton.kvtransfer.blocks.memory import SharedFile
from baton.kvtransfer.blocks.pool import BlockPool
from baton.node.errors import InvariantBroken, PeerLost, SettingsError
from baton.node.telemetry import log_event
from baton.worker.io_thread import RankLost
from baton.worker.ranks.links import RankLink
from baton.worker.ranks.messages import BEAT_S, PoolMade, RankBeat, RankMessage, SharedBytes, decode, encode

logger = logging.getLogger("ranks")

LOST_S = 2.5
"""Without a beat."""
LOAD_S = 3600.0
"""All load their parts at the same time."""
STOP_S = 2.0

Deliver = Callable[[RankLost], None]
T = TypeVar("T")


class Ranks(Protocol):
    """Other processes of a worker."""

    def watch(self, deliver: Deliver) -> None:
        """From now on a thread calls `deliver` when one is lost, and what waits for that one ends with PeerLost."""
        ...

    def close(self) -> None:
        """End them. May be repeated."""
        ...


class Shuttable(Protocol):
    """A link that ends what waits at its ends when it is shut."""

    def shut(self) -> None: ...


class NoRanks:
    """A worker of one process."""

    def share_pool(self, made: PoolMade) -> None: ...

    def watch(self, deliver: Deliver) -> None: ...

    def close(self) -> None: ...


NO_RANKS = NoRanks()


class MemberWatch:
    """Notices that one of some processes is gone; `controls`: the links to them. Made in the main thread."""

    def __init__(
        self, controls: Sequence[RankLink], links: Sequence[Shuttable], on_lost: Callable[[], None] = lambda: None
    ) -> None:
        """links: shut, as the controls are, when one is lost; on_lost: called behind that, to end waits that are not at
        a link."""
        self._on_lost = on_lost
        self._controls, self._links = controls, links
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, deliver: Deliver) -> None:
        self._thread = threading.Thread(target=self._run, args=(deliver,), name="ranks", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """From now on it is no loss that one ends."""
        self._ended.set()

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join(STOP_S)

    def _run(self, deliver: Deliver) -> None:
        reason = first_lost(self._controls, self._ended)
        if not self._ended.is_set():
            log_event(logger, "rank_lost", level=logging.ERROR, reason=reason)
            for link in (*self._controls, *self._links):
                link.shut()
            deliver(RankLost(reason))
            self._on_lost()


def first_lost(controls: Sequence[RankLink], ended: threading.Event) -> str:
    """Waits until a process at the other end of these links ends, or sends no beats, and says so; "" if `ended` is set
    before."""
    with selectors.DefaultSelector() as selector:
        for control in controls:
            selector.register(control, selectors.EVENT_READ, control)
        beats = Beats([control.name for control in controls], time.monotonic())
        reason = ""
        while not reason and not ended.is_set():
            ready = selector.select(BEAT_S)
            for key, _ in ready:
                try:
                    key.data.receive(0.0)
                except PeerLost as error:
                    reason = str(error)
                else:
                    beats.heard(key.data.name, time.monotonic())
            reason = reason or beats.missing(time.monotonic())
    return reason


class Beats:
    """When each was heard last, by name. A process that stood still itself blames no other for that."""

    def __init__(self, names: Sequence[str], now: float) -> None:
        self._heard_at = dict.fromkeys(names, now)
        self._looked_at = now

    def heard(self, name: str, now: float) -> None:
        self._heard_at[name] = now

    def missing(self, now: float) -> str:
        """What is wrong, or ""; to be asked every BEAT_S."""
        pause_s, self._looked_at = now - self._looked_at, now
        if pause_s > 2 * BEAT_S:
            self._heard_at = {name: heard_at + pause_s for name, heard_at in self._heard_at.items()}
        name, heard_at = min(self._heard_at.items(), key=lambda item: item[1])
        return f"{name} does not answer" if now - heard_at > LOST_S else ""


def start_process(module: str, control: RankLink, fds: Sequence[int]) -> subprocess.Popen[bytes]:
    """python -m MODULE, with its end of the control link, and what else it inherits open."""
    return subprocess.Popen(
        (sys.executable, "-P", "-m", module, str(control.fileno())),
        stdin=subprocess.DEVNULL,
        pass_fds=[control.fileno(), *fds],
    )


def tell(controls: Sequence[RankLink], messages: Sequence[RankMessage]) -> None:
    """A message to each, which starts. SettingsError if one has ended."""
    try:
        for control, message in zip(controls, messages, strict=True):
            control.send(encode(message))
    except PeerLost as error:
        raise SettingsError(f"{error} while it started") from None


def answers(controls: Sequence[RankLink], kind: type[T]) -> list[T]:
    """A message of this kind from each, in order. SettingsError if one cannot start."""
    found: list[T] = []
    try:
        for control in controls:
            message = decode(control.receive(LOAD_S))
            if not isinstance(message, kind):
                raise InvariantBroken(f"{type(message).__name__} from {control.name}, not {kind.__name__}")
            found.append(message)
    except PeerLost as error:
        raise SettingsError(f"{error} while it started") from None
    return found


def beat(controls: Sequence[RankLink]) -> None:
    """In a thread: says at the other ends that this process runs, until one of them is gone."""
    while True:
        try:
            for control in controls:
                control.send(encode(RankBeat()))
        except PeerLost:
            return
        time.sleep(BEAT_S)


def reap(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait for their end, and make it come."""
    deadline = time.monotonic() + STOP_S
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            with suppress(subprocess.TimeoutExpired):  # a driver may hold it for longer
                process.wait(STOP_S)


def pool_made(pool: BlockPool) -> PoolMade:
    """Where this process has it."""
    return PoolMade(
        pid=os.getpid(),
        memory=shared_bytes(pool.shared),
        num_blocks=pool.num_blocks,
        block_tokens=pool.layout.block_tokens,
    )


def shared_bytes(shared: SharedFile | None) -> SharedBytes:
    """SettingsError where processes cannot share memory."""
    if shared is None:
        raise SettingsError("--tp and --pp: this system has no memfd_create, by which processes share memory")
    return SharedBytes(shared.fd, shared.size_bytes, shared.nonce)
