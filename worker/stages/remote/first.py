"""The first stage's side of stages on other hosts: lets them join, gives them their parts, watches and ends them.

Steps go through this process between any two stages, so that a stage dials one address and is dialed by decode workers
alone.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from typing import TypeVar

import msgspec

from baton.kvtransfer.planes.base import Plane
from baton.node.credentials import Credentials
from baton.node.errors import PeerLost, SettingsError
from baton.node.messages.transfer import PlaneAddress
from baton.node.sockets import Context
from baton.node.telemetry import log_event
from baton.worker.io_thread import RankLost
from baton.worker.ranks.members import LOAD_S, LOST_S, NO_RANKS, Deliver, Ranks
from baton.worker.ranks.messages import BEAT_S, ModelPart
from baton.worker.stages.remote.copies import FromStage, decode_given
from baton.worker.stages.remote.end import RemotePlaneEnd
from baton.worker.stages.remote.links import ParcelLink
from baton.worker.stages.remote.messages import (
    FROM_STAGE,
    STAGE_VERSION,
    AdapterForgotten,
    BlocksTaken,
    BlockSums,
    BlocksWanted,
    Bytes,
    Channel,
    PieceEnded,
    PieceIdle,
    StageAssigned,
    StageEnd,
    StageJoin,
    StageLeaving,
    StageLoaded,
    StageMessage,
    StagePool,
    StageReady,
    StageRefused,
)
from baton.worker.stages.remote.transport import Transport

logger = logging.getLogger("stages")

POOL_S = 60.0
T = TypeVar("T")

TakeSums = Callable[[int, Sequence[int], bytes], None]
"""Of a stage, for these blocks."""


def terminate_this_process() -> None:
    """The worker is drained, as if it had got the signal itself."""
    os.kill(os.getpid(), signal.SIGTERM)


class RemoteStages:
    """The stages after the first; worker.ranks.members.Ranks. They join in any order, and load at once."""

    def __init__(
        self,
        model: ModelPart,
        num_ranks: int,
        name: str,
        credentials: Credentials,
        bind: str,
        drain: Callable[[], None] = terminate_this_process,
    ) -> None:
        """model: as the first stage has it. drain: called when a stage is to end. Raises SettingsError where `bind`
        cannot be bound."""
        self._drain = drain
        self._model, self._num_ranks, self._name = model, num_ranks, name
        self._count = model.num_stages
        self._stages: list[str] = []
        """Those that have joined, in order: the first of them is stage 1."""
        self._loaded: dict[str, StageLoaded] = {}
        self._answers: SimpleQueue[tuple[str, StageMessage] | PeerLost] = SimpleQueue()
        self._answered: set[tuple[str, type[StageMessage]]] = set()
        """What each has said of its start, once."""
        self._ends: dict[str, RemotePlaneEnd] = {}
        self._take_sums: TakeSums = lambda stage, blocks, sums: None
        self._take_answer: Callable[[FromStage], None] = lambda answer: None
        self._ranks: Ranks = NO_RANKS
        self._deliver: Deliver | None = None
        self._lost = ""
        self._lock = threading.Lock()
        """Of the two before."""
        self.following = ParcelLink("stage 1", partial(self._send_parcel, 1, "steps"))
        self.last = ParcelLink(f"stage {self._count - 1}", partial(self._send_parcel, self._count - 1, "draws"))
        self._context = Context(credentials)
        try:
            self._transport = Transport(self._context, bind, self)
        except SettingsError:
            self._context.close()
            raise
        log_event(logger, "stages_awaited", count=self._count - 1, address=self._transport.address)
        self._transport.begin()

    def with_ranks(self, ranks: Ranks) -> RemoteStages:
        """From now on it watches and ends these too."""
        self._ranks = ranks
        return self

    def wait_loaded(self) -> None:
        """Until all have loaded their parts. SettingsError if one cannot."""
        for peer, message in self._wait(StageLoaded, LOAD_S):
            self._loaded[peer] = message

    def check_weights(self, fingerprint: bytes) -> None:
        """SettingsError unless all stages have read the weights of this one."""
        for peer, loaded in self._loaded.items():
            if loaded.fingerprint != fingerprint:
                number = self._stages.index(peer) + 1
                self._transport.send(peer, StageRefused(reason="it has read other weights than the first stage"))
                raise SettingsError(f"stage {number} ({peer}) has read other weights than the first stage")

    def make_ends(self, num_blocks: int, block_tokens: int, names: Sequence[str], rows: Sequence[int]) -> list[Plane]:
        """Let the stages make their pools and ends of the data plane, called `names`, with so many `rows`."""
        pools = [StagePool(num_blocks=num_blocks, block_tokens=block_tokens, end=name) for name in names]
        for peer, pool in zip(self._stages, pools, strict=True):
            self._transport.send(peer, pool)
        addresses = {peer: message.plane for peer, message in self._wait(StageReady, POOL_S)}
        ends: list[Plane] = []
        for peer, num_rows in zip(self._stages, rows, strict=True):
            ends.append(self._end(peer, addresses[peer], num_rows))
        return ends

    def give_sums(self, take: TakeSums) -> None:
        """Called, from now on, by the transport's thread with what a stage has summed up, before a step's draws."""
        self._take_sums = take

    def give_answers(self, take: Callable[[FromStage], None]) -> None:
        """Called, from now on, by the transport's thread with what stages answer to the two methods below."""
        self._take_answer = take

    def want_blocks(self, stage: int, wanted: BlocksWanted) -> None:
        self._transport.send(self._stages[stage - 1], wanted)

    def give_blocks(self, stage: int, record: bytes, data: Bytes) -> None:
        self._send_parcel(stage, "blocks", record, data)

    def give_adapter(self, stage: int, record: bytes, data: Bytes) -> None:
        self._send_parcel(stage, "adapters", record, data)

    def forget_adapter(self, number: int) -> None:
        for peer in self._stages:
            self._transport.send(peer, AdapterForgotten(number=number))

    def watch(self, deliver: Deliver) -> None:
        with self._lock:
            self._deliver, lost = deliver, self._lost
        self._transport.limit_silence(LOST_S)
        self._ranks.watch(deliver)
        if lost:
            deliver(RankLost(lost))

    def close(self) -> None:
        if self._deliver is not None and not self._lost:  # else they end as after any loss
            for peer in self._stages:
                self._transport.send(peer, StageEnd())
        self._transport.close()
        for link in (self.following, self.last):
            link.shut()
        self._context.close()
        self._ranks.close()

    # -- the transport's thread

    def on_message(self, peer: str, message: StageMessage) -> None:
        if isinstance(message, StageRefused) and peer in self._stages:
            self._transport.lose(peer, f"cannot go on: {message.reason}")
        elif isinstance(message, StageJoin):
            self._on_join(peer, message)
        elif not isinstance(message, FROM_STAGE):
            raise PeerLost(f"{type(message).__name__} from a stage")
        elif isinstance(message, BlockSums):
            self._take_sums(self._stages.index(peer) + 1, message.blocks, message.sums)
        elif isinstance(message, BlocksTaken):
            self._take_answer(FromStage(self._stages.index(peer) + 1, message.copy, message.sums))
        elif isinstance(message, PieceEnded | PieceIdle):
            if peer in self._ends:
                self._ends[peer].take(message)
        elif isinstance(message, StageLeaving):
            log_event(logger, "stage_leaving", stage=self._stages.index(peer) + 1)
            self._drain()
        elif (peer, type(message)) in self._answered:
            raise PeerLost(f"{type(message).__name__} came twice")
        else:
            self._answered.add((peer, type(message)))
            self._answers.put((peer, message))

    def on_parcel(self, peer: str, channel: Channel, record: bytes, data: bytearray) -> None:
        number = self._stages.index(peer) + 1
        if channel == "draws" and number == self._count - 1:
            self.last.deliver(record, data)
        elif channel == "blocks":
            self._take_answer(FromStage(number, decode_given(record).copy, data))
        elif channel == "steps" and number < self._count - 1:
            self._send_parcel(number + 1, "steps", record, data)
        else:
            raise PeerLost(f"a parcel of {channel} from stage {number}")

    def on_lost(self, peer: str, reason: str) -> None:
        reason = f"stage {self._stages.index(peer) + 1} {reason}"
        log_event(logger, "rank_lost", level=logging.ERROR, reason=reason)
        for link in (self.following, self.last):
            link.shut()
        self._answers.put(PeerLost(reason))
        with self._lock:
            self._lost, deliver = reason, self._deliver
        if deliver is not None:
            deliver(RankLost(reason))

    def work(self) -> float:
        return BEAT_S

    def sockets(self) -> list[object]:
        return []

    # -- inside

    def _on_join(self, peer: str, join: StageJoin) -> None:
        if peer in self._stages:
            return  # the answer is on its way
        refusal = ""
        if join.version != STAGE_VERSION:
            refusal = f"version {join.version} of stages, this worker speaks {STAGE_VERSION}"
        elif len(self._stages) == self._count - 1:
            refusal = f"this worker has all its {self._count} stages"
        if refusal:
            log_event(logger, "stage_refused", level=logging.WARNING, peer=peer, reason=refusal)
            self._transport.send(peer, StageRefused(reason=refusal))
            return
        self._transport.open(peer, self._transport.connection_of(peer))
        self._stages.append(peer)
        number = len(self._stages)
        part = msgspec.structs.replace(self._model, stage=number, folder="")
        name = f"{self._name}/stage-{number}"
        log_event(logger, "stage_joined", stage=number, of=self._count, peer=peer)
        self._transport.send(peer, StageAssigned(name=name, model=part, num_ranks=self._num_ranks))

    def _wait(self, kind: type[T], wait_s: float) -> list[tuple[str, T]]:
        """A message of this kind from each stage."""
        found: list[tuple[str, T]] = []
        while len(found) < self._count - 1:
            try:
                answer = self._answers.get(timeout=wait_s)
            except Empty:
                raise SettingsError(
                    f"--stages-bind {self._transport.address}: {len(self._stages)} of {self._count - 1} stages have "
                    f"joined, and {len(found)} are ready, after {wait_s:.0f} s"
                ) from None
            if isinstance(answer, PeerLost):
                raise SettingsError(f"{answer} while it started")
            peer, message = answer
            if not isinstance(message, kind):
                raise SettingsError(f"{type(message).__name__} from stage {peer} while it started, not {kind.__name__}")
            found.append((peer, message))
        return found

    def _end(self, peer: str, address: PlaneAddress, num_rows: int) -> RemotePlaneEnd:
        end = self._ends[peer] = RemotePlaneEnd(address, num_rows, partial(self._transport.send, peer))
        return end

    def _send_parcel(self, number: int, channel: Channel, record: bytes, data: Bytes) -> None:
        self._transport.send_parcel(self._stages[number - 1], channel, record, data)
