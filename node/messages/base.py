"""What all messages share: bounded field types, the base class, MessagePack encoding and decoding.

An unknown tag, an unknown field, a value out of bounds or trailing bytes make `decode_as` raise `BadMessage`, and no
other exception.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from baton.node.decoding import DECODE_ERRORS

PROTOCOL_VERSION = 4
"""Of the messages between a proxy and the nodes that join it. See versions.py: the version before is served too."""

MAX_BODY_BYTES = 8 << 20
MAX_TOKENS = 1 << 20
MAX_TOKEN_ID = (1 << 31) - 1
MAX_BLOCKS, MAX_OFFER_BLOCKS = 1 << 16, 1 << 12
MAX_BLOCK_ID = (1 << 31) - 1
MAX_EVENT_BLOCKS = 1 << 13
"""Hashes in one list of a message about KV events."""

Name = Annotated[str, Meta(min_length=1, max_length=96)]
Text = Annotated[str, Meta(max_length=4096)]
Digest = Annotated[bytes, Meta(max_length=32)]
TransferId = Annotated[bytes, Meta(min_length=16, max_length=16)]
Count = Annotated[int, Meta(ge=0, le=(1 << 62))]
Small = Annotated[int, Meta(ge=0, le=1 << 20)]
BlockId = Annotated[int, Meta(ge=0, le=MAX_BLOCK_ID)]
TokenId = Annotated[int, Meta(ge=0, le=MAX_TOKEN_ID)]
Role = Literal["prefill", "decode", "mixed"]
"""A mixed worker is a decode worker that also computes prompts for others."""
Tier = Literal["gpu", "ram", "disk"]
"""Where a block rests: a worker's pool ("gpu", whatever device it is on), its host's RAM arena or disk."""
FinishReason = Literal["", "stop", "length"]
Bias = Annotated[float, Meta(ge=-100.0, le=100.0)]
Seconds = Annotated[float, Meta(ge=0.0, le=1e7)]
Rate = Annotated[float, Meta(ge=0.0, le=1e12)]
TokenIds = Annotated[tuple[TokenId, ...], Meta(max_length=MAX_TOKENS)]
Hashes = Annotated[tuple[Digest, ...], Meta(max_length=MAX_BLOCKS)]
EventHashes = Annotated[tuple[Digest, ...], Meta(max_length=MAX_EVENT_BLOCKS)]


class BadMessage(ValueError):
    """The bytes are not a valid message."""


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="t", kw_only=True):
    """Base of all messages; the tag is the class name."""


_encoder = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    """The MessagePack bytes of `message`."""
    return _encoder.encode(message)


def decode_as(body: bytes | memoryview, decoder: msgspec.msgpack.Decoder[Message]) -> Message:
    """The message in `body`; raises BadMessage for anything that is not exactly one valid message of the decoder's."""
    if len(body) > MAX_BODY_BYTES:
        raise BadMessage(f"message of {len(body)} bytes, at most {MAX_BODY_BYTES} are allowed")
    try:
        return decoder.decode(body)
    except DECODE_ERRORS as error:
        raise BadMessage(str(error)[:300]) from None
