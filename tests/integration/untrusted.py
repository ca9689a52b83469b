"""Untrusted peers of a cluster: raw ZeroMQ clients on its ports, and a second proxy that a test controls.

They have the secret of the cluster: what a node without it can do is in test_strangers.py.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import zmq

from baton.launch.local import free_port
from baton.node.credentials import Keys, NodeRole
from baton.node.messages.base import Message, encode
from baton.node.messages.control import (
    AdapterLoaded,
    AdapterRef,
    Busy,
    Cancel,
    Cancelled,
    DispatchBody,
    Drain,
    Failed,
    Goodbye,
    HandedOver,
    Heartbeat,
    KvEvents,
    KvReplay,
    KvSnapshot,
    Load,
    LoadAdapter,
    Ping,
    Prefill,
    PromptLogprob,
    PromptLogprobs,
    Refused,
    Register,
    Registered,
    RegisterStore,
    Rejoin,
    Reserve,
    Reserved,
    SamplingSpec,
    TierChange,
    Tokens,
)
from baton.node.messages.transfer import (
    Abort,
    Aborted,
    Accept,
    Ack,
    Finish,
    Grant,
    Hello,
    Offer,
    PlaneAddress,
    Renew,
    Renewed,
    Valid,
    Validate,
    Welcome,
)
from baton.node.messages.wire import decode
from baton.worker.ranks.messages import ModelPart
from baton.worker.stages.remote.messages import (
    STAGE_VERSION,
    AdapterForgotten,
    BlocksTaken,
    BlockSums,
    BlocksWanted,
    Parcel,
    ParcelPiece,
    PeerForgotten,
    PeerKnown,
    PieceCancel,
    PieceEnded,
    PieceIdle,
    PieceSend,
    StageAssigned,
    StageBeat,
    StageEnd,
    StageJoin,
    StageLeaving,
    StageLoaded,
    StageMessage,
    StagePool,
    StageReady,
    StageRefused,
)

SAMPLING = SamplingSpec(max_tokens=8)


class RawClient:
    """A ZeroMQ client with any identity, which sends any frames.

    With `keys` it is a client in `role` of a server in the role `server`."""

    def __init__(
        self,
        port: int,
        identity: bytes = b"unknown/1",
        kind: int = zmq.DEALER,
        *,
        keys: Keys | None = None,
        role: NodeRole = "decode",
        server: NodeRole = "proxy",
    ) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(kind)
        self._socket.setsockopt(zmq.LINGER, 500)
        self._socket.setsockopt(zmq.SNDTIMEO, 2000)
        if identity:
            self._socket.setsockopt(zmq.IDENTITY, identity)
        if keys is not None:
            self._socket.setsockopt(zmq.CURVE_SERVERKEY, keys.public(server))
            self._socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.pair(role).public)
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, keys.pair(role).private)
        self._socket.connect(f"tcp://127.0.0.1:{port}")

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy(500)

    def send(self, *messages: Message) -> None:
        for message in messages:
            self.frames(encode(message))

    def frames(self, *frames: bytes) -> None:
        with contextlib.suppress(zmq.Again):
            self._socket.send_multipart(frames)

    def receive(self, wait_s: float, count: int | None = None) -> list[Message]:
        """`count` messages, or all that arrive within `wait_s`."""
        received: list[Message] = []
        until = time.monotonic() + wait_s
        while len(received) != count and self._socket.poll(max(0, int((until - time.monotonic()) * 1000))):
            received.append(decode(self._socket.recv()))
        return received


def register_of(name: str, incarnation: int, namespace: bytes) -> Register:
    return Register(
        worker=name,
        incarnation=incarnation,
        role="decode",
        model="demo",
        namespace=namespace,
        block_tokens=16,
        total_blocks=1000,
        max_num_seqs=64,
        max_model_len=2048,
        address="tcp://127.0.0.1:1",
    )


def body_of(**changes: Any) -> DispatchBody:
    known: dict[str, Any] = {
        "token_ids": (5, 6, 7),
        "prompt_len": 3,
        "root": b"r" * 32,
        "block_hashes": (),
        "sampling": SAMPLING,
        "deadline_s": 3.0,
    }
    return DispatchBody(**(known | changes))


def prefill_of(request_id: str, decode_worker: str, **changes: Any) -> Prefill:
    address = changes.pop("decode_address", "tcp://127.0.0.1:1")
    body = body_of(**changes)
    return Prefill(request_id=request_id, attempt=0, body=body, decode=decode_worker, decode_address=address)


def reserve_of(request_id: str, prefill_worker: str, **changes: Any) -> Reserve:
    return Reserve(request_id=request_id, attempt=0, body=body_of(**changes), prefill=prefill_worker)


def one_of_each(request_id: str) -> list[Message]:
    """One message of every type, about an existing request and a transfer that does not exist."""
    transfer = b"t" * 16
    own: dict[str, Any] = {"worker": "unknown", "incarnation": 1}
    leg: dict[str, Any] = {"request_id": request_id, "attempt": 0}
    plane = PlaneAddress(plane="zmq", host="nowhere", address="tcp://127.0.0.1:1")
    made: list[Message] = [
        register_of("unknown", 1, bytes(32)),
        register_of("another", 1, bytes(32)),
        Registered(proxy="unknown", incarnation=1),
        Heartbeat(**own, load=Load(running=5, counters={'x"}\n': float("nan")})),
        Goodbye(**own),
        Ping(proxy="unknown", incarnation=1),
        Rejoin(),
        Drain(),
        LoadAdapter(adapter=AdapterRef(digest=bytes(32), path="/nowhere")),
        AdapterLoaded(digest=bytes(32), error="x" * 4096),
        prefill_of(request_id, "unknown/1"),
        reserve_of(request_id, "unknown/1"),
        reserve_of(request_id, ""),
        Reserved(**leg, cached_tokens=0),
        Busy(**leg, reason="x"),
        PromptLogprobs(**leg, first=1, entries=(PromptLogprob(-1.0, 1),)),
        Tokens(**leg, index=0, ids=(9, 9, 9)),
        Tokens(**leg, index=5, ids=(9,), finish="stop"),
        HandedOver(**leg, sent_bytes=1, transfer_s=0.0),
        Failed(**leg, reason="x", retryable=False),
        Cancelled(**leg),
        Cancel(**leg),
        Hello(worker="unknown/1", namespace=bytes(32), planes=(plane,)),
        Hello(worker="another/1", namespace=bytes(32), planes=()),
        Welcome(worker="unknown/1", plane=plane),
        Grant(transfer_id=transfer, **leg, first_block=0, num_blocks=1, lease_s=1e7),
        Offer(transfer_id=transfer, seq=0, first_block=0, source=(1,), digest=b"d" * 16),
        Accept(transfer_id=transfer, seq=0),
        Validate(transfer_id=transfer, seq=0),
        Valid(transfer_id=transfer, seq=0),
        Finish(transfer_id=transfer, num_chunks=0, token_id=2**31 - 1),
        Renew(transfer_ids=(transfer,) * 4096),
        Renewed(transfer_id=transfer),
        Ack(transfer_id=transfer),
        Abort(transfer_id=transfer, reason="x" * 4096),
        Aborted(transfer_id=transfer),
        Refused(reason="go away"),
        RegisterStore(worker="unknown", incarnation=1),
        RegisterStore(worker="another", incarnation=1),
        KvEvents(seq=1 << 62, changes=()),
        KvEvents(seq=1, changes=(TierChange("gpu", (b"h",) * 100, (b"", b"h" * 32)), TierChange("disk", (b"h",)))),
        KvSnapshot(seq=1 << 62, part=0, parts=1 << 20, changes=(TierChange("ram", (b"h" * 32,)),)),
        KvReplay(seq=1),
    ]
    return made


def one_of_each_stage_message() -> list[StageMessage]:
    """One message of every type between a stage on another host and the first, about a transfer that does not exist."""
    transfer: dict[str, Any] = {"transfer_id": b"t" * 16}
    piece: dict[str, Any] = {**transfer, "seq": 0, "retry": 0}
    plane = PlaneAddress(plane="zmq", host="nowhere", address="tcp://127.0.0.1:1")
    part = ModelPart(
        folder="",
        dtype="auto",
        kv_dtype="auto",
        load_format="auto",
        quantization=None,
        max_model_len=None,
        vocab_size=512,
    )
    return [
        StageJoin(version=STAGE_VERSION + 1),
        StageRefused(reason="go away"),
        StageAssigned(name="unknown", model=part, num_ranks=1),
        StageLoaded(fingerprint=bytes(32)),
        StagePool(num_blocks=1 << 62, block_tokens=16, end="unknown/1"),
        StageReady(plane=plane),
        StageBeat(),
        Parcel(channel="draws", record_bytes=1 << 32, data_bytes=1 << 32),
        ParcelPiece(),
        BlockSums(blocks=(1 << 62,), sums=b"s" * 16),
        BlocksWanted(copy=1, blocks=(1 << 62,)),
        BlocksTaken(copy=1, sums=b"s"),
        PeerKnown(peer="unknown/1", address=plane),
        PeerForgotten(peer="unknown/1"),
        PieceSend(peer="unknown/1", **piece, runs=((0, 1 << 62),)),
        PieceCancel(**transfer),
        PieceEnded(**piece, reason="x" * 4096),
        PieceIdle(**transfer),
        AdapterForgotten(number=1 << 62),
        StageLeaving(),
        StageEnd(),
    ]


class SecondProxy:
    """A second proxy of the workers, controlled by the test."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self.address = f"tcp://127.0.0.1:{free_port()}"
        self._boxes: dict[str, list[Message]] = {"prefill-0": [], "decode-0": []}
        self._connections: dict[str, bytes] = {}

    def listen(self, keys: Keys) -> None:
        """From now on workers of the cluster with these keys can connect."""
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.CURVE_SERVER, 1)
        self._socket.setsockopt(zmq.CURVE_SECRETKEY, keys.pair("proxy").private)
        self._socket.bind(self.address)

    def join(self) -> tuple[Register, Register]:
        """Accept both workers; returns the Register of prefill and of decode."""
        found: dict[str, Register] = {}
        joined: set[str] = set()
        self._boxes = {"prefill-0": [], "decode-0": []}
        for peer, message in self._listen(60.0):
            if isinstance(message, Register):  # perhaps an old one, of a worker that has hung up since
                found[message.role] = message
                joined.discard(peer)
            elif isinstance(message, Heartbeat) and message.worker in [each.worker for each in found.values()]:
                joined.add(peer)
            if len(joined) == 2:
                break
        return found["prefill"], found["decode"]

    def send(self, worker: Register, *messages: Message) -> None:
        for message in messages:
            self._socket.send_multipart([self._connections[worker.worker], encode(message)])

    def receive(self, worker: Register, count: int, wait_s: float = 60.0) -> list[Message]:
        """A worker's next messages about requests: `count`, or as many as arrive within `wait_s`."""
        box = self._boxes[worker.worker]
        if len(box) < count:
            for _ in self._listen(wait_s):
                if len(box) >= count:
                    break
        received, self._boxes[worker.worker] = box[:count], box[count:]
        return received

    def close(self) -> None:
        self._context.destroy(500)

    def _listen(self, wait_s: float) -> Iterator[tuple[str, Message]]:
        until = time.monotonic() + wait_s
        while time.monotonic() < until:
            if self._socket.poll(100):
                peer, body = self._socket.recv_multipart()
                message = decode(body)
                if isinstance(message, Register):
                    try:
                        self._socket.send_multipart([peer, encode(Registered(proxy="second", incarnation=1))])
                    except zmq.ZMQError:
                        continue  # it has hung up since, in a long silence, and registers again
                    self._connections[message.worker] = peer
                elif not isinstance(message, Heartbeat | KvEvents):
                    self._boxes[peer.decode().partition("/")[0]].append(message)
                yield peer.decode(), message
