"""What a stage on another host and the first stage say to each other.

    stage -> first   StageJoin, StageLoaded, StageReady, BlockSums, BlocksTaken, PieceEnded, PieceIdle, StageLeaving
    first -> stage   StageAssigned, StagePool, BlocksWanted, PeerKnown, PeerForgotten, PieceSend, PieceCancel,
                     AdapterForgotten, StageEnd
    both             StageRefused, StageBeat, Parcel, ParcelPiece

Both are of one version. Messages are numbered from 1 in each direction, so that a lost one is noticed; StageJoin and
StageRefused, which are sent outside of that order, have number 0.
"""

from __future__ import annotations

import struct
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from baton.node.decoding import DECODE_ERRORS
from baton.node.errors import PeerLost
from baton.node.messages.base import Count, Name, Small, Text, TransferId
from baton.node.messages.transfer import PlaneAddress
from baton.worker.ranks.messages import ModelPart

STAGE_VERSION = 2
PARCEL_BYTES = 1 << 32
PIECE_BYTES = 1 << 20
"""Of a parcel in one message: on a slow link beats are not kept waiting for longer."""
MESSAGE_BYTES = 4 << 20
MAX_SUMS_BYTES = 1 << 20
MAX_COPIED_BLOCKS = 1 << 12
"""Of one copy."""
MAX_RUNS = 1 << 18
MAX_ROWS = 1 << 22
"""Of one send."""
MAX_TEXT = 4096

Bytes = bytes | bytearray | memoryview
Channel = Literal["steps", "draws", "blocks", "adapters"]
"""Steps on their way through the stages; masks from the first to the last one, and back what it has drawn; blocks
between the store and a stage's pool; a stage's part of an adapter."""


class Base(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, kw_only=True):
    """All messages below."""


class StageJoin(Base, frozen=True):
    """A process that would be a stage; repeated until answered."""

    version: Small


class StageRefused(Base, frozen=True):
    """To the other end: it is no part of this worker, or cannot be."""

    reason: Text


class StageAssigned(Base, frozen=True):
    """The answer to StageJoin: which stage it is. The folder of the model is the stage's own."""

    name: Name
    """In logs."""
    model: ModelPart
    num_ranks: Small
    """Processes that share the stage."""


class StageLoaded(Base, frozen=True):
    """It has loaded its part of the model."""

    fingerprint: Annotated[bytes, Meta(min_length=32, max_length=32)]
    """Of all weights of the model (models.fingerprint): stages of different weights would make KV of none."""


class StagePool(Base, frozen=True):
    """The pool that a loaded stage shall have, and the name of its end of the data plane."""

    num_blocks: Count
    block_tokens: Small
    end: Annotated[str, Meta(min_length=1, max_length=128)]


class StageReady(Base, frozen=True):
    """It can compute steps."""

    plane: PlaneAddress


class StageBeat(Base, frozen=True):
    """Every BEAT_S: the process runs."""


class StageLeaving(Base, frozen=True):
    """Its process got a signal to end: the worker is to be drained."""


class StageEnd(Base, frozen=True):
    """The worker ends."""


class Parcel(Base, frozen=True):
    """A record and the bytes of a tensor, which follow in pieces."""

    channel: Channel
    record_bytes: Annotated[int, Meta(ge=0, le=PARCEL_BYTES)]
    data_bytes: Annotated[int, Meta(ge=0, le=PARCEL_BYTES)]


class ParcelPiece(Base, frozen=True):
    """The next bytes of the parcel, behind the message."""


class BlockSums(Base, frozen=True):
    """Sums of the layers that a step has written in these blocks, of each block in the order of layer_sums."""

    blocks: Annotated[tuple[Count, ...], Meta(min_length=1, max_length=1 << 16)]
    sums: Annotated[bytes, Meta(max_length=MAX_SUMS_BYTES)]


class BlocksWanted(Base, frozen=True):
    """For a copy to the store: a parcel of the stage's part of these blocks answers."""

    copy: Count
    blocks: Annotated[tuple[Count, ...], Meta(min_length=1, max_length=MAX_COPIED_BLOCKS)]


class BlocksTaken(Base, frozen=True):
    """A parcel of blocks is in the stage's pool, whose sums these are, as in BlockSums."""

    copy: Count
    sums: Annotated[bytes, Meta(max_length=MAX_SUMS_BYTES)]


class PeerKnown(Base, frozen=True):
    """A decode worker's end of the data plane."""

    peer: Annotated[str, Meta(min_length=1, max_length=128)]
    address: PlaneAddress


class PeerForgotten(Base, frozen=True):
    """Nothing more is sent to it; sends that are left end as failed."""

    peer: Annotated[str, Meta(min_length=1, max_length=128)]


class PieceSend(Base, frozen=True):
    """Send rows of the stage's pool; see planes.base.Plane.post_send."""

    peer: Annotated[str, Meta(min_length=1, max_length=128)]
    transfer_id: TransferId
    seq: Count
    retry: Count
    runs: Annotated[tuple[tuple[Count, Count], ...], Meta(min_length=1, max_length=MAX_RUNS)]
    """Rows in order: the first of a run, and their number."""


class PieceCancel(Base, frozen=True):
    """PieceIdle answers when nothing of it reads the pool any more."""

    transfer_id: TransferId


class PieceEnded(Base, frozen=True):
    """A send has ended."""

    transfer_id: TransferId
    seq: Count
    retry: Count
    reason: Text = ""
    """Empty: all is sent."""


class PieceIdle(Base, frozen=True):
    """The answer to PieceCancel."""

    transfer_id: TransferId


class AdapterForgotten(Base, frozen=True):
    """An adapter of the parcels of adapters: no slot is filled with it any more."""

    number: Count


StageMessage = (
    StageJoin
    | StageRefused
    | StageAssigned
    | StageLoaded
    | StagePool
    | StageReady
    | StageBeat
    | StageLeaving
    | StageEnd
    | Parcel
    | ParcelPiece
    | BlockSums
    | BlocksWanted
    | BlocksTaken
    | PeerKnown
    | PeerForgotten
    | PieceSend
    | PieceCancel
    | PieceEnded
    | PieceIdle
    | AdapterForgotten
)
UNNUMBERED = (StageJoin, StageRefused)
FROM_STAGE = (StageJoin, StageLoaded, StageReady, BlockSums, BlocksTaken, PieceEnded, PieceIdle, StageLeaving)
FROM_FIRST = (
    StageAssigned,
    StagePool,
    BlocksWanted,
    PeerKnown,
    PeerForgotten,
    PieceSend,
    PieceCancel,
    AdapterForgotten,
    StageEnd,
)

_NUMBER = struct.Struct("<Q")
_decoder = msgspec.msgpack.Decoder(StageMessage)
_encoder = msgspec.msgpack.Encoder()


def encode_frames(number: int, message: StageMessage, data: Bytes = b"") -> list[Bytes]:
    return [_NUMBER.pack(number), _encoder.encode(message), data]


def decode_frames(frames: list[bytes]) -> tuple[int, StageMessage, bytes]:
    """Number, message and what follows it. PeerLost for what is no message."""
    if len(frames) != 3 or len(frames[0]) != _NUMBER.size:
        raise PeerLost(f"{len(frames)} frames are no message of a stage")
    try:
        message = _decoder.decode(frames[1])
    except DECODE_ERRORS as error:
        raise PeerLost(f"no message of a stage: {error}") from None
    (number,) = _NUMBER.unpack(frames[0])
    if (number == 0) != isinstance(message, UNNUMBERED):
        raise PeerLost(f"{type(message).__name__} with number {number}")
    return number, message, frames[2]
