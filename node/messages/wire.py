"""The union of all messages that a worker's or a proxy's endpoint accepts, with one MessagePack decoder."""

from __future__ import annotations

import functools
import operator

import msgspec

from baton.node.messages.base import Message, decode_as
from baton.node.messages.control import (
    AdapterLoaded,
    Bundle,
    Busy,
    Cancel,
    Cancelled,
    Drain,
    Failed,
    Goodbye,
    HandedOver,
    Heartbeat,
    KvEvents,
    KvReplay,
    KvSnapshot,
    LoadAdapter,
    Ping,
    Prefill,
    PromptLogprobs,
    Refused,
    Register,
    Registered,
    RegisterStore,
    Rejoin,
    Reserve,
    Reserved,
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
    Renew,
    Renewed,
    Valid,
    Validate,
    Welcome,
)

MESSAGES: tuple[type[Message], ...] = (
    Register, Registered, Refused, Heartbeat, Goodbye, Ping, Rejoin, Drain, LoadAdapter, AdapterLoaded,
    RegisterStore, KvEvents, KvReplay, KvSnapshot,
    Prefill, Reserve, Cancel, Reserved, Busy, PromptLogprobs, Tokens, Bundle, HandedOver, Failed, Cancelled,
    Hello, Welcome, Grant, Offer, Accept, Validate, Valid, Finish, Renew, Renewed, Ack, Abort, Aborted,
)  # fmt: skip

_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(functools.reduce(operator.or_, MESSAGES))  # type: ignore[arg-type]


def decode(body: bytes | memoryview) -> Message:
    """The message in `body`; raises BadMessage for anything that is not exactly one of them."""
    return decode_as(body, _decoder)
