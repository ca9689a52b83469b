"""Messages to and from a host's KV store: a separate union, so that no other node can be sent one of them.

A worker numbers its own lookups and puts; `(worker, id)` names what the store holds for it. The store holds it while
messages of the worker arrive at least every `lease_s` by the store's clock.

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

from baton.node.messages.base import MAX_BLOCKS, Count, Message, Name, Small, Text, decode_as

STORE_VERSION = 3
"""Of the messages below. A worker has no store while the host's has another version."""

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
    """A block's tier. In RAM, the block is at `offset` of the arena with this digest, and is held for the requester."""

    tier: Tier
    offset: Count = 0
    digest: Checksum = b""


class Arrival(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """Block number `index` of a lookup is now in RAM; without a digest: it could not be loaded."""

    index: Index
    offset: Count = 0
    digest: Checksum = b""


class Slot(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """Room for block number `index` of a put, at `offset` of the arena."""

    index: Index
    offset: Count


class Written(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """Block number `index` of a put has been copied into its slot; `digest` is of the source bytes."""

    index: Index
    digest: Annotated[bytes, Meta(min_length=16, max_length=16)]


# ---- worker -> store --------------------------------------------------------------------------------------------


class Attach(Message, tag="Attach", kw_only=True):
    """A worker asks to use the store; retransmitted until answered."""

    version: Small = STORE_VERSION
    namespace: Annotated[bytes, Meta(min_length=32, max_length=32)]
    """Blocks of different namespaces are never shared."""
    block_bytes: Annotated[int, Meta(ge=1, le=1 << 30)]
    """Size of a record: a block with all units of the model."""
    num_units: Annotated[int, Meta(ge=1, le=1 << 16)]
    """Equal parts of a record, one behind the other."""
    digest: DigestName
    """How a record's digest is computed from its units; equal for all workers of a namespace."""


class Beat(Message, tag="Beat", kw_only=True):
    """The worker is alive; answered with Alive, or with Detached if the store does not know it."""


class Lookup(Message, tag="Lookup", kw_only=True):
    """Find a chain of blocks from number `first` on. Those before it count as used too, which defers their eviction."""

    id: Count
    first: Index
    hashes: BlockHashes


class Fetch(Message, tag="Fetch", kw_only=True):
    """Load these blocks of a lookup into RAM."""

    id: Count
    indices: Annotated[tuple[Index, ...], Meta(max_length=4096)]


class Put(Message, tag="Put", kw_only=True):
    """The worker offers these blocks; the store answers with slots for those it takes."""

    id: Count
    hashes: BlockHashes


class Commit(Message, tag="Commit", kw_only=True):
    """These blocks of a put are written; slots that are not named are freed."""

    id: Count
    written: Annotated[tuple[Written, ...], Meta(max_length=4096)]


class Release(Message, tag="Release", kw_only=True):
    """Free everything held under `id`."""

    id: Count


class Touch(Message, tag="Touch", kw_only=True):
    """This chain of blocks has been used: evict it last, its tail before its head."""

    hashes: BlockHashes


class Damaged(Message, tag="Damaged", kw_only=True):
    """This block's bytes in the arena do not match its digest."""

    hash: BlockHash


# ---- store -> worker --------------------------------------------------------------------------------------------


class Attached(Message, tag="Attached", kw_only=True):
    """How a process of the same host maps the arena (see kvtransfer.blocks.memory)."""

    store: Name
    """Endpoint identity of this incarnation of the store, `name/incarnation`."""
    host: Name
    pid: Count
    fd: Count
    size_bytes: Count
    nonce: Annotated[bytes, Meta(min_length=16, max_length=16)]
    lease_s: Annotated[float, Meta(gt=0.0, le=3600.0)]


class Detached(Message, tag="Detached", kw_only=True):
    """The store holds nothing for this worker, which may attach again unless `final`."""

    reason: Text
    final: bool = False


class Alive(Message, tag="Alive", kw_only=True):
    """The answer to Beat."""


class Found(Message, tag="Found", kw_only=True):
    """The longest run of available blocks from the lookup's `first` on."""

    id: Count
    places: Annotated[tuple[Place, ...], Meta(max_length=1 << 16)]


class Fetched(Message, tag="Fetched", kw_only=True):
    id: Count
    arrivals: Annotated[tuple[Arrival, ...], Meta(max_length=4096)]


class Granted(Message, tag="Granted", kw_only=True):
    """Slots for those blocks of a put that the store accepts."""

    id: Count
    slots: Annotated[tuple[Slot, ...], Meta(max_length=1 << 16)]


# ---- store <-> store --------------------------------------------------------------------------------------------


class PeerLookup(Message, tag="PeerLookup", kw_only=True):
    """Ask how many of these blocks, from the first on, the peer's store can serve."""

    id: Count
    namespace: Annotated[bytes, Meta(min_length=32, max_length=32)]
    hashes: BlockHashes


class PeerFound(Message, tag="PeerFound", kw_only=True):
    id: Count
    count: Count


class PeerGet(Message, tag="PeerGet", kw_only=True):
    """Request the bytes [offset, offset + size_bytes) of a block."""

    namespace: Annotated[bytes, Meta(min_length=32, max_length=32)]
    hash: BlockHash
    offset: Count
    size_bytes: Annotated[int, Meta(ge=1, le=MAX_PIECE_BYTES)]


class PeerData(Message, tag="PeerData", kw_only=True):
    """The answer to PeerGet. The digest is the whole block's; without one the block is not available."""

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
    """The store message in `body`; raises BadMessage for anything that is not exactly one."""
    return decode_as(body, _decoder)
