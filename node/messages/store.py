"""Every message to and from a host's KV store: a union of its own, so that no other node can be sent one of them.

A worker numbers its lookups and puts itself; `(worker, id)` names what the store holds for it. The store keeps whatever
it holds for a worker as long as it hears of the worker at least every `lease_s`, on its own clock.

Who sends what:

    worker -> store   Attach, Beat, Lookup, Fetch, Put, Commit, Release, Touch, Damaged
    store  -> worker  Attached, Detached, Alive, Found, Fetched, Granted
    store  -> store   PeerLookup, PeerFound, PeerGet, PeerData
"""

from __future__ import annotations

import functools
import operator
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from baton.node.messages.base import MAX_BLOCKS, PROTOCOL_VERSION, Count, Message, Name, Small, Text, decode_as

BlockHash = Annotated[bytes, Meta(min_length=32, max_length=32)]
BlockHashes = Annotated[tuple[BlockHash, ...], Meta(max_length=MAX_BLOCKS)]
Checksum = Annotated[bytes, Meta(max_length=16)]
DigestName = Literal["xxh3", "sum64"]
"""See kvtransfer/blocks/checksum.py."""
Index = Annotated[int, Meta(ge=0, le=(1 << 16) - 1)]
Tier = Annotated[int, Meta(ge=0, le=2)]

RAM, DISK, PEER = 0, 1, 2
"""Where a block lies, as `Place.tier` says it."""
TIER_NAMES = ("ram", "disk", "peer")
MAX_PIECE_BYTES = 1 << 20
"""Of a block that travels between stores, in one message."""


# ---- values inside messages -------------------------------------------------------------------------------------


class Place(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """Where a block is. In RAM it lies at `offset` of the arena, is held for whoever asked, and has this digest."""

    tier: Tier
    offset: Count = 0
    digest: Checksum = b""


class Arrival(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """Block number `index` of a lookup is in RAM now; without a digest: it could not be had."""

    index: Index
    offset: Count = 0
    digest: Checksum = b""


class Slot(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """Room for block number `index` of a put, at `offset` of the arena."""

    index: Index
    offset: Count


class Written(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """Block number `index` of a put has been copied into its slot; the digest is of the bytes that were meant."""

    index: Index
    digest: Annotated[bytes, Meta(min_length=16, max_length=16)]


# ---- worker -> store --------------------------------------------------------------------------------------------


class Attach(Message, tag="Attach", kw_only=True):
    """A worker wants to use the store; repeated until answered."""

    version: Small = PROTOCOL_VERSION
    namespace: Annotated[bytes, Meta(min_length=32, max_length=32)]
    """Blocks of different namespaces never meet."""
    block_bytes: Annotated[int, Meta(ge=1, le=1 << 30)]
    """Of a record: a block with all units of the model."""
    num_units: Annotated[int, Meta(ge=1, le=1 << 16)]
    """Equal parts of a record, one behind the other."""
    digest: DigestName
    """How the units are summed up for a record's digest; all workers of a namespace do it the same way."""


class Beat(Message, tag="Beat", kw_only=True):
    """The worker lives; answered with Alive, or with Detached by a store that does not know it."""


class Lookup(Message, tag="Lookup", kw_only=True):
    """Which of a chain of blocks can be had, from number `first` on? Those before it are used too: keep them young."""

    id: Count
    first: Index
    hashes: BlockHashes


class Fetch(Message, tag="Fetch", kw_only=True):
    """Bring these blocks of a lookup, which are not in RAM, there."""

    id: Count
    indices: Annotated[tuple[Index, ...], Meta(max_length=4096)]


class Put(Message, tag="Put", kw_only=True):
    """The worker has these blocks: which does the store want, and where?"""

    id: Count
    hashes: BlockHashes


class Commit(Message, tag="Commit", kw_only=True):
    """These blocks of a put are written; slots that are not named are given back."""

    id: Count
    written: Annotated[tuple[Written, ...], Meta(max_length=4096)]


class Release(Message, tag="Release", kw_only=True):
    """All that is held under `id` is used no more."""

    id: Count


class Touch(Message, tag="Touch", kw_only=True):
    """This chain of blocks has been used: of all blocks it goes last, its head after its tail."""

    hashes: BlockHashes


class Damaged(Message, tag="Damaged", kw_only=True):
    """This block's bytes in the arena do not have its digest."""

    hash: BlockHash


# ---- store -> worker --------------------------------------------------------------------------------------------


class Attached(Message, tag="Attached", kw_only=True):
    """How a process of the same host maps the arena (see kvtransfer.blocks.memory)."""

    store: Name
    """Identity of this life of the store, `name/incarnation`."""
    host: Name
    pid: Count
    fd: Count
    size_bytes: Count
    nonce: Annotated[bytes, Meta(min_length=16, max_length=16)]
    lease_s: Annotated[float, Meta(gt=0.0, le=3600.0)]


class Detached(Message, tag="Detached", kw_only=True):
    """The store holds nothing for this worker, which may attach (again), unless `final`."""

    reason: Text
    final: bool = False


class Alive(Message, tag="Alive", kw_only=True):
    """The answer to Beat."""


class Found(Message, tag="Found", kw_only=True):
    """The longest run of blocks, from the lookup's `first` on, that can be had."""

    id: Count
    places: Annotated[tuple[Place, ...], Meta(max_length=1 << 16)]


class Fetched(Message, tag="Fetched", kw_only=True):
    id: Count
    arrivals: Annotated[tuple[Arrival, ...], Meta(max_length=4096)]


class Granted(Message, tag="Granted", kw_only=True):
    """Slots for those blocks of a put that the store wants."""

    id: Count
    slots: Annotated[tuple[Slot, ...], Meta(max_length=1 << 16)]


# ---- store <-> store --------------------------------------------------------------------------------------------


class PeerLookup(Message, tag="PeerLookup", kw_only=True):
    """How many of these blocks, from the first on, can that store give away?"""

    id: Count
    namespace: Annotated[bytes, Meta(min_length=32, max_length=32)]
    hashes: BlockHashes


class PeerFound(Message, tag="PeerFound", kw_only=True):
    id: Count
    count: Count


class PeerGet(Message, tag="PeerGet", kw_only=True):
    """The bytes [offset, offset + size_bytes) of a block, please."""

    namespace: Annotated[bytes, Meta(min_length=32, max_length=32)]
    hash: BlockHash
    offset: Count
    size_bytes: Annotated[int, Meta(ge=1, le=MAX_PIECE_BYTES)]


class PeerData(Message, tag="PeerData", kw_only=True):
    """The answer to PeerGet. The digest is the whole block's; without one the block cannot be had."""

    namespace: Annotated[bytes, Meta(min_length=32, max_length=32)]
    hash: BlockHash
    offset: Count
    digest: Checksum = b""
    data: Annotated[bytes, Meta(max_length=MAX_PIECE_BYTES)] = b""


STORE_MESSAGES: tuple[type[Message], ...] = (
    Attach, Beat, Lookup, Fetch, Put, Commit, Release, Touch, Damaged,
    Attached, Detached, Alive, Found, Fetched, Granted,
    PeerLookup, PeerFound, PeerGet, PeerData,
)  # fmt: skip

_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(functools.reduce(operator.or_, STORE_MESSAGES))  # type: ignore[arg-type]


def decode_store(body: bytes | memoryview) -> Message:
    """The message in `body`; raises BadMessage for anything that is not exactly one of a store's."""
    return decode_as(body, _decoder)
