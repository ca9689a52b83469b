"""Stages on other hosts: how they join, what is refused, and that a link which lost a message is lost itself."""

from __future__ import annotations

import queue
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, get_args

import numpy as np
import pytest

from baton.kvtransfer.blocks.checksum import SUM_BYTES
from baton.kvtransfer.blocks.copies import HostCopies, Pair
from baton.kvtransfer.blocks.layout import KVLayout
from baton.kvtransfer.blocks.pool import BlockPool
from baton.kvtransfer.blocks.stage_pools import SpreadPools, layer_sums
from baton.kvtransfer.planes.base import ChunkKey, IoDone
from baton.kvtransfer.reshard import Cut
from baton.models.adapters.slots import NO_SLOTS
from baton.models.batch import Row
from baton.node import sockets
from baton.node.credentials import Credentials, Keys
from baton.node.errors import PeerLost, SettingsError
from baton.node.messages.transfer import PlaneAddress
from baton.node.sockets import Context
from baton.tests.integration.untrusted import one_of_each_stage_message
from baton.worker.io_thread import RankLost
from baton.worker.ranks.messages import ModelPart
from baton.worker.stages.remote.adapters import GivenAdapters
from baton.worker.stages.remote.copies import SpreadCopies, StageCopies
from baton.worker.stages.remote.end import RemotePlaneEnd
from baton.worker.stages.remote.first import RemoteStages
from baton.worker.stages.remote.joining import FirstStageLink, NotAPart, summing, written_blocks
from baton.worker.stages.remote.messages import (
    PIECE_BYTES,
    STAGE_VERSION,
    BlocksTaken,
    BlockSums,
    BlocksWanted,
    PeerKnown,
    PieceCancel,
    PieceEnded,
    PieceIdle,
    PieceSend,
    StageAssigned,
    StageBeat,
    StageJoin,
    StageLeaving,
    StageLoaded,
    StageMessage,
    StagePool,
    StageRefused,
    decode_frames,
    encode_frames,
)
from baton.worker.stages.remote.transport import OPTIONS

WAIT_S = 60.0
KEYS = Keys(b"k" * 32)
ADDRESS = PlaneAddress(plane="zmq", host="here", address="tcp://127.0.0.1:9")
LAYOUT = KVLayout.of_model(num_layers=5, kv_heads=2, head_dim=8, block_tokens=4, dtype="float32")


class FirstStage:
    """The first stage of a worker, without a model."""

    def __init__(self, stack: ExitStack, count: int = 2) -> None:
        part = ModelPart(
            folder="/here",
            dtype="float32",
            kv_dtype="auto",
            load_format="auto",
            quantization=None,
            max_model_len=None,
            vocab_size=512,
            num_stages=count,
        )
        self.lost: queue.SimpleQueue[RankLost] = queue.SimpleQueue()
        self.drained: queue.SimpleQueue[bool] = queue.SimpleQueue()
        keys = Credentials("stage", KEYS)
        self.stages = RemoteStages(part, 1, "p", keys, "tcp://127.0.0.1:0", lambda: self.drained.put(True))
        self.address = self.stages._transport.address
        stack.callback(self.stages.close)

    def lost_for(self) -> str:
        return self.lost.get(timeout=WAIT_S).reason


class RawStage:
    """A stage that sends whatever it is given."""

    def __init__(self, stack: ExitStack, first: FirstStage, name: str = "raw") -> None:
        context = Context(Credentials("stage", KEYS))
        stack.callback(context.close)
        self._socket = sockets.open_dealer(
            context, first.address, OPTIONS, server="stage", identity=name, secret=b"s" * 16
        )
        self._socket.SNDTIMEO = self._socket.RCVTIMEO = int(WAIT_S * 1000)

    def send(self, number: int, message: StageMessage, data: bytes = b"") -> None:
        self._socket.send_multipart(encode_frames(number, message, data))

    def receive(self) -> StageMessage:
        """The next one that is no beat."""
        while isinstance(message := decode_frames(self._socket.recv_multipart())[1], StageBeat):
            pass
        return message

    def join(self) -> None:
        self.send(0, StageJoin(version=STAGE_VERSION))
        assert isinstance(self.receive(), StageAssigned)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def stage_of(stack: ExitStack, first: FirstStage, name: str) -> FirstStageLink:
    context = Context(Credentials("stage", KEYS))
    stack.callback(context.close)
    link = FirstStageLink(context, first.address, name, WAIT_S)
    stack.callback(link.close)
    return link


class SendingEnd:
    """A stage's end of a plane, which only describes itself."""

    pending = False

    def describe(self) -> PlaneAddress:
        return ADDRESS

    def poll(self) -> list[IoDone]:
        return []

    def sockets(self) -> list[object]:
        return []

    def close(self) -> None: ...


def start(first: FirstStage, *links: FirstStageLink, pools: Sequence[BlockPool] = ()) -> list[int]:
    """From joining until the stages are ready; the numbers that the links have got."""
    numbers = [link.receive(StageAssigned, WAIT_S).model.stage for link in links]
    for link in links:
        link.send(StageLoaded(fingerprint=bytes(32)))
    first.stages.wait_loaded()
    of_stage = dict(enumerate(pools, start=1))
    for link, number in zip(links, numbers, strict=True):
        pool = of_stage.get(number) or BlockPool(LAYOUT, 8)
        link.use(SendingEnd(), pool, GivenAdapters(NO_SLOTS))  # type: ignore[arg-type]
    names = [f"end/{number}" for number in range(len(links))]
    first.stages.make_ends(8, 4, names, [80] * len(links))
    assert {link.receive(StagePool, WAIT_S).num_blocks for link in links} == {8}
    first.stages.watch(first.lost.put)
    return numbers


def test_steps_pass_all_stages_and_sums_are_there_before_what_was_drawn(stack: ExitStack) -> None:
    """Guards against parcels that arrive cut or in another order, and a digest that is asked for too early."""
    first = FirstStage(stack, 3)
    one, other = stage_of(stack, first, "a"), stage_of(stack, first, "b")
    numbers = start(first, one, other)
    assert sorted(numbers) == [1, 2]
    middle, last = (one, other) if numbers[0] == 1 else (other, one)
    seen: list[tuple[int, Any]] = []
    first.stages.give_sums(lambda stage, blocks, sums: seen.append((stage, blocks)))
    residual = random.Random(1).randbytes(2 * PIECE_BYTES + 17)
    first.stages.following.send(b"rows", residual)
    record, data = middle.steps.receive(WAIT_S)
    assert (record, bytes(data)) == (b"rows", residual)
    middle.send(BlockSums(blocks=(3,), sums=b"s"))
    middle.steps.send(record, memoryview(data)[::-1].tobytes())
    assert bytes(last.steps.receive(WAIT_S)[1]) == residual[::-1]
    first.stages.last.send(b"masks", b"")
    assert last.draws.receive(WAIT_S)[0] == b"masks"
    last.draws.send(b"drawn", b"")
    assert first.stages.last.receive(WAIT_S) == (b"drawn", bytearray())
    assert seen == [(1, (3,))]


def test_a_stage_that_ends_is_lost_and_ends_what_waits_for_it(stack: ExitStack) -> None:
    first = FirstStage(stack)
    link = stage_of(stack, first, "a")
    start(first, link)
    link.close()
    assert "stage 1" in first.lost_for()
    with pytest.raises(PeerLost, match="stage 1 has ended"):
        first.stages.last.receive(WAIT_S)
    with pytest.raises(PeerLost, match="stage 1 has ended"):
        first.stages.following.send(b"rows")


def test_a_stage_that_is_silent_is_lost(stack: ExitStack) -> None:
    """Guards against a worker that waits for a host that is gone, whose connection stays."""
    first = FirstStage(stack)
    first.stages.watch(first.lost.put)
    raw = RawStage(stack, first)
    raw.join()
    first.stages._transport.limit_silence(0.01)
    assert first.lost_for() == "stage 1 does not answer"


def test_a_worker_that_ends_says_so(stack: ExitStack) -> None:
    """Guards against stages that wait for a first stage that is gone, and end with an error at each drain."""
    first = FirstStage(stack)
    link = stage_of(stack, first, "a")
    start(first, link)
    first.stages.close()
    with pytest.raises(PeerLost, match="first stage has ended"):
        link.steps.receive(WAIT_S)
    assert link.ended


def test_a_stage_of_other_weights_or_too_many_or_of_another_version_is_refused(stack: ExitStack) -> None:
    """Guards against KV of two models under one name, and an error that does not say which process is wrong."""
    first = FirstStage(stack)
    old = RawStage(stack, first, "old")
    old.send(0, StageJoin(version=STAGE_VERSION + 1))
    assert old.receive() == StageRefused(
        reason=f"version {STAGE_VERSION + 1} of stages, this worker speaks {STAGE_VERSION}"
    )
    link = stage_of(stack, first, "a")
    start(first, link)
    with pytest.raises(SettingsError, match=r"stage 1 \(a\) has read other weights"):
        first.stages.check_weights(b"w" * 32)
    with pytest.raises(NotAPart, match="other weights"):
        link.receive(StageAssigned, WAIT_S)
    more = stage_of(stack, first, "more")
    with pytest.raises(NotAPart, match="this worker has all its 2 stages"):
        more.receive(StageAssigned, WAIT_S)


def test_a_stage_that_answers_twice_is_lost(stack: ExitStack) -> None:
    """Guards the start against one stage that counts for two, and a queue that is never read."""
    first = FirstStage(stack, 3)
    first.stages.watch(first.lost.put)
    raw, other = RawStage(stack, first, "a"), RawStage(stack, first, "b")
    raw.join()
    other.join()
    for number in (1, 2):
        raw.send(number, StageLoaded(fingerprint=bytes(32)))
    assert first.lost_for() == "stage 1 StageLoaded came twice"


@pytest.mark.parametrize("message", one_of_each_stage_message(), ids=lambda message: type(message).__name__)
def test_no_message_of_a_stage_breaks_the_first_one(stack: ExitStack, message: StageMessage) -> None:
    """Guards against a worker that hangs, or dies of anything but a lost stage, by what a stage says; and against
    messages that are lost without notice."""
    first = FirstStage(stack)
    first.stages.watch(first.lost.put)
    raw = RawStage(stack, first)
    raw.join()
    number = 0 if isinstance(message, StageJoin | StageRefused) else 1
    raw.send(number, message)
    raw.send(99, StageBeat())  # all before it are lost
    assert "stage 1" in first.lost_for()
    assert first.stages._transport._thread.is_alive()


def test_the_list_of_messages_has_all_of_them() -> None:
    messages = one_of_each_stage_message()
    assert {type(message) for message in messages} == set(get_args(StageMessage))
    for message in messages:
        number = 0 if isinstance(message, StageJoin | StageRefused) else 5
        frames = [bytes(frame) for frame in encode_frames(number, message, b"data")]
        assert decode_frames(frames) == (number, message, b"data")
    for frames in ([b""], [b"\0" * 8, b"\xc1", b""], [b"\0" * 8, bytes(encode_frames(0, StageBeat())[1]), b""]):
        with pytest.raises(PeerLost):
            decode_frames(frames)


@pytest.mark.parametrize(
    "runs", [((0, 1 << 62),), ((0, 1), (79, 2)), ((0, 0),)], ids=["too many rows", "rows of no pool", "no row"]
)
def test_a_first_stage_that_asks_for_the_impossible_is_lost(
    stack: ExitStack, runs: tuple[tuple[int, int], ...]
) -> None:
    """Guards the memory of a stage, and its thread, which would end with an error of its own."""
    first = FirstStage(stack)
    link = stage_of(stack, first, "a")
    start(first, link)
    first.stages._transport.send("a", PieceSend(peer="d/0", transfer_id=b"t" * 16, seq=0, retry=0, runs=runs))
    with pytest.raises(PeerLost, match="rows in one send"):
        link.steps.receive(WAIT_S)
    assert not link.ended


def test_a_signal_to_a_stage_drains_the_worker(stack: ExitStack) -> None:
    first = FirstStage(stack)
    link = stage_of(stack, first, "a")
    start(first, link)
    link.send(StageLeaving())
    assert first.drained.get(timeout=WAIT_S)


def test_blocks_of_a_send_are_held_until_the_stage_has_let_go_of_them() -> None:
    """Guards against blocks that are written while another host still sends them."""
    sent: list[StageMessage] = []
    end = RemotePlaneEnd(ADDRESS, 100, sent.append)
    first, second = ChunkKey(b"a" * 16, 0, 0), ChunkKey(b"b" * 16, 0, 0)
    end.post_send("d/1", first, [1])
    assert [done.ok for done in end.poll()] == [False], "it is not connected"
    end.connect("d/1", ADDRESS)
    end.post_send("d/1", first, [4, 5, 6, 9])
    end.post_send("d/1", second, [7])
    assert [type(message) for message in sent] == [PeerKnown, PieceSend, PieceSend]
    assert sent[1] == PieceSend(peer="d/1", transfer_id=b"a" * 16, seq=0, retry=0, runs=((4, 3), (9, 1)))
    assert end.pending and not end.idle(b"a" * 16) and end.poll() == []
    end.take(PieceEnded(transfer_id=b"a" * 16, seq=0, retry=0))
    assert end.poll() == [IoDone(first, sending=True, ok=True)] and end.idle(b"a" * 16)
    end.cancel(b"b" * 16)
    assert sent[-1] == PieceCancel(transfer_id=b"b" * 16) and not end.idle(b"b" * 16)
    end.take(PieceEnded(transfer_id=b"b" * 16, seq=0, retry=0, reason="late"))
    end.take(PieceIdle(transfer_id=b"b" * 16))
    assert end.idle(b"b" * 16) and end.poll() == [] and not end.pending


def test_digests_of_stages_on_several_hosts_are_those_of_one_pool() -> None:
    """Guards against KV that decode workers take for damaged: they sum up the layers of one pool."""
    cut = Cut.even(LAYOUT.num_units, 1, LAYOUT.num_layers, 3)
    whole = BlockPool(LAYOUT, 3)
    for block in range(3):
        whole.write(block, random.Random(block).randbytes(whole.block_bytes))
    spread, _ = spread_over(cut, whole)
    assert spread.digests([[0, 2], [2]]) == [whole.layers_digest([0, 2]), whole.layers_digest([2])]
    for blocks, sums in (((3,), b"s" * 64), ((1,), b"s"), ((1 << 62,), b"s" * 64)):
        with pytest.raises(PeerLost, match="are no sums"):
            spread.take_sums(1, blocks, sums)


def spread_over(cut: Cut, whole: BlockPool) -> tuple[SpreadPools, list[BlockPool]]:
    """The contents of a pool in pools of stages: that of the first, and the others."""
    spread = SpreadPools(cut, LAYOUT, whole.num_blocks)
    others = [BlockPool(KVLayout(len(layers), 0, 2, 2, 8, 4, "float32"), whole.num_blocks) for layers in cut.layers[1:]]
    for block in range(whole.num_blocks):
        parts = np.frombuffer(whole.block(block), np.uint8).reshape(2, 5, -1)
        for pool, layers in zip((spread.own, *others), cut.layers, strict=True):
            pool.write(block, parts[:, layers.start : layers.stop].tobytes())
    for stage, pool in enumerate(others, start=1):
        for block in range(whole.num_blocks):
            spread.take_sums(stage, (block,), layer_sums([pool], block))
    return spread, others


def ended(copies: SpreadCopies, copy: int) -> list[bytes]:
    deadline = time.monotonic() + WAIT_S
    while (digests := copies.ended(copy)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return digests


def test_records_of_the_store_are_those_of_one_pool(stack: ExitStack) -> None:
    """Guards against KV that other workers cannot load, layers of a stage at the place of another's, loaded blocks that
    cannot be handed over, and damage that is loaded."""
    cut = Cut.even(LAYOUT.num_units, 1, LAYOUT.num_layers, 3)
    whole = BlockPool(LAYOUT, 4)
    for block in range(4):
        whole.write(block, random.Random(block).randbytes(whole.block_bytes))
    spread, others = spread_over(cut, whole)
    first = FirstStage(stack, 3)
    start(first, stage_of(stack, first, "a"), stage_of(stack, first, "b"), pools=others)
    copies, plain = SpreadCopies(spread, first.stages), HostCopies(whole)
    first.stages.give_answers(copies.take)
    records = [bytearray(whole.block_bytes) for _ in range(2)]
    saved = ended(copies, copies.begin_save([Pair(3, memoryview(records[0])), Pair(1, memoryview(records[1]))]))
    assert records == [whole.block(3), whole.block(1)]
    expected = [bytearray(whole.block_bytes) for _ in range(2)]
    pairs = [Pair(block, memoryview(each)) for block, each in zip((3, 1), expected, strict=True)]
    assert saved == plain.ended(plain.begin_save(pairs))
    loaded = ended(copies, copies.begin_load([Pair(0, memoryview(records[0])), Pair(2, memoryview(records[1]))]))
    assert loaded == saved
    assert spread.digests([[0, 2]]) == [whole.layers_digest([3, 1])]
    others[1].block(3)[5] ^= 1  # after it was summed up
    assert ended(copies, copies.begin_save([Pair(3, memoryview(records[0]))])) == [b""]


def test_messages_of_a_full_batch_of_small_blocks_are_understood(stack: ExitStack) -> None:
    """Guards against a store that ends its worker by a message which is too long for a stage."""
    layout = KVLayout.of_model(num_layers=4, kv_heads=2, head_dim=1, block_tokens=1, dtype="float32")
    cut = Cut.even(layout.num_units, 1, layout.num_layers, 2)
    copies = SpreadCopies(SpreadPools(cut, layout, 2), FirstStage(stack).stages)
    blocks = range(copies.batch_blocks)
    sums = bytes(len(blocks) * layout.num_units * len(cut.layers[1]) * SUM_BYTES)
    for message in (BlocksWanted(copy=1, blocks=tuple(blocks)), BlocksTaken(copy=1, sums=sums)):
        assert decode_frames([bytes(frame) for frame in encode_frames(1, message)])[1] == message


@pytest.mark.parametrize(
    ("record", "data"), [(b"\xc1", b""), (b"\x92\x01\x91\x63", b""), (b"\x92\x01\x91\x00", b"short")], ids=str
)
def test_blocks_that_do_not_fit_are_not_written(record: bytes, data: bytes) -> None:
    with pytest.raises(PeerLost):
        StageCopies(BlockPool(LAYOUT, 2)).take(record, bytearray(data))


def test_what_a_step_writes_is_summed_up() -> None:
    """Guards against a block whose later half is not in its sum, and one that no step has touched."""
    rows = [Row((1, 2, 3), 2, (7, 5, 9), None), Row((1,), 3, (4,), None), Row((), 8, (1, 2, 3), None)]
    assert written_blocks(rows, 4) == [7, 5, 4]
    pool, sent = BlockPool(LAYOUT, 10), list[StageMessage]()
    for block in range(10):
        pool.write(block, random.Random(block).randbytes(pool.block_bytes))
    send: Callable[[StageMessage], None] = sent.append
    summing(pool, send)(rows)
    (message,) = sent
    assert isinstance(message, BlockSums) and message.blocks == (7, 5, 4)
    assert message.sums == b"".join(layer_sums([pool], block) for block in (7, 5, 4))
