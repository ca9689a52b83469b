"""What peers send: no bytes make a decoder raise anything but its own exception, or change on a way there and back."""

from __future__ import annotations

import random

import msgspec
import pytest

from baton.kvtransfer.planes.base import ChunkKey
from baton.kvtransfer.planes.channel import (
    Channel,
    ChannelMessage,
    Close,
    Open,
    SendGranted,
    SendRefused,
    SendRequest,
    StorePut,
)
from baton.kvtransfer.planes.zeromq import _HEADER, _MAGIC, _VERSION, _parse
from baton.node.addresses import LOOPBACK
from baton.node.connections import NameHolders, NameTaken, connection_id, stated_name
from baton.node.credentials import Credentials
from baton.node.errors import PeerLost
from baton.node.messages.base import BadMessage, Message, encode
from baton.node.messages.store import (
    Arrival,
    Attach,
    Attached,
    Commit,
    Damaged,
    Detached,
    Fetch,
    Fetched,
    Found,
    Granted,
    Lookup,
    PeerData,
    PeerFound,
    PeerGet,
    PeerLookup,
    Place,
    Put,
    Release,
    Slot,
    Touch,
    Written,
    decode_store,
)
from baton.node.messages.wire import decode
from baton.node.sockets import Context
from baton.tests.fuzz.mutations import feed, mutations
from baton.tests.integration.untrusted import one_of_each, one_of_each_stage_message
from baton.worker.stages.remote.messages import decode_frames, encode_frames

HASH, NAMESPACE = b"h" * 32, b"n" * 32
STORE_MESSAGES: list[Message] = [
    Attach(namespace=NAMESPACE, block_bytes=4096, num_units=2, digest="xxh3"),
    Lookup(id=1, first=0, hashes=(HASH, HASH)),
    Fetch(id=1, indices=(0, 1)),
    Put(id=2, hashes=(HASH,)),
    Commit(id=2, written=(Written(0, b"d" * 16),)),
    Release(id=2),
    Touch(hashes=(HASH,)),
    Damaged(hash=HASH),
    Attached(store="s/1", host="h", pid=1, fd=2, size_bytes=3, nonce=b"n" * 16, lease_s=5.0),
    Detached(reason="x", final=True),
    Found(id=1, places=(Place(0, 5, b"d" * 16), Place(2))),
    Fetched(id=1, arrivals=(Arrival(0, 1, b"d"),)),
    Granted(id=1, slots=(Slot(0, 1),)),
    PeerLookup(id=1, namespace=NAMESPACE, hashes=(HASH,)),
    PeerFound(id=1, count=1),
    PeerGet(namespace=NAMESPACE, hash=HASH, offset=0, size_bytes=5),
    PeerData(namespace=NAMESPACE, hash=HASH, offset=0, digest=b"d" * 16, data=b"x" * 64),
]
CHANNEL_MESSAGES: list[ChannelMessage] = [
    Open(b"c" * 16),
    StorePut(b"c" * 16, "key", b"value"),
    SendRequest(b"c" * 16, 0, b"t" * 16, 1, 0, 4, 4096),
    SendGranted(b"c" * 16, 0, (1, 2), True),
    SendRefused(b"c" * 16, 0),
    Close(b"c" * 16),
]


def test_control_and_transfer_messages() -> None:
    """Guards every node's endpoint, which drops what raises BadMessage and ends with any other exception."""

    def accept(data: bytes) -> None:
        message = decode(data)
        assert encode(decode(encode(message))) == encode(message)

    feed([encode(message) for message in one_of_each("r-0")], 50_000, accept, BadMessage)


def test_stage_messages() -> None:
    """Guards prefill workers and their stages on other hosts, which take what raises PeerLost for a lost link."""

    def accept(data: bytes) -> None:
        number, message, _ = decode_frames([b"\1" + bytes(7), data, b""])
        assert decode_frames([bytes(frame) for frame in encode_frames(number, message)])[:2] == (number, message)

    samples = [bytes(encode_frames(1, message)[1]) for message in one_of_each_stage_message()]
    feed(samples, 20_000, accept, PeerLost)


def test_store_messages() -> None:
    """Guards the host's store and its clients."""

    def accept(data: bytes) -> None:
        message = decode_store(data)
        assert encode(decode_store(encode(message))) == encode(message)

    feed([encode(message) for message in STORE_MESSAGES], 20_000, accept, BadMessage)


def test_frames_of_a_channel() -> None:
    """Guards the thread of a data plane: what is no message of a connected peer is counted."""
    context = Context(Credentials("decode"))
    channel = Channel(context, "a/1", LOOPBACK)
    assert channel.connect("b/1", "tcp://127.0.0.1:1")
    encoder = msgspec.msgpack.Encoder()
    taken: list[tuple[str, ChannelMessage]] = []
    count = 10_000
    connection = connection_id("b/1", b"s", "x").encode()
    for data in mutations([encoder.encode(message) for message in CHANNEL_MESSAGES], count):
        channel._take([connection, data], taken)
    assert len(taken) + channel.dropped["malformed"] == count and taken and channel.dropped["malformed"]
    for data in mutations([connection], 1000):
        channel._take([data, encoder.encode(CHANNEL_MESSAGES[0])], taken)
    channel._take([connection], taken)
    channel._take([connection, b"", b""], taken)
    channel.close()
    context.close()


def test_connection_ids() -> None:
    """Guards the table of names against ids that are no text, and against its growth."""
    holders = NameHolders(limit=100)
    known = [connection_id(f"decode-{number}/1", b"s", "x").encode() for number in range(20)]

    def accept(data: bytes) -> None:
        assert (holders.find(data) or holders.learn(data, None)).name == stated_name(data)
        assert len(holders._holders) <= 100 and len(holders._connections) <= 100

    feed(known, 8000, accept, (NameTaken, UnicodeDecodeError))


@pytest.mark.parametrize("seed", [1, 2])
def test_headers_of_the_zmq_plane(seed: int) -> None:
    """Guards the copy of bytes into blocks: only a header of ours has a key."""
    key = ChunkKey(b"t" * 16, 7, 1)
    whole = _HEADER.pack(_MAGIC, _VERSION, *key, 3, 4096)
    assert _parse(memoryview(whole)) == (key, 3, 4096)
    found = [_parse(memoryview(data)) for data in mutations([whole], 4000, seed)]
    assert None in found and any(found)


def test_a_flipped_bit_of_any_message_is_refused_or_another_valid_message() -> None:
    """Guards against a bit that makes a decoder accept what it would not encode."""
    chance = random.Random(3)
    for message in [*one_of_each("r-0"), *STORE_MESSAGES]:
        body = encode(message)
        read = decode_store if message in STORE_MESSAGES else decode
        for bit in chance.sample(range(8 * len(body)), min(100, 8 * len(body))):
            flipped = bytearray(body)
            flipped[bit // 8] ^= 1 << bit % 8
            try:
                again = read(bytes(flipped))
            except BadMessage:
                continue
            assert encode(read(encode(again))) == encode(again)
