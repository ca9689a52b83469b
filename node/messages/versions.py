"""The versions of the protocol between a proxy and the nodes that join it that are spoken here: this one and the one
before it, so that proxies and workers can be replaced one by one.

It owns what is new in this version, and how a message is written without that. It knows no link. A node reads both
versions with one decoder: what is new has a default, and what the version before had stays until the next one. What is
new for the second time is not here any more, and peers of that age are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec
from msgspec import UNSET
from msgspec.structs import fields, replace

from baton.node.messages.base import PROTOCOL_VERSION, Message
from baton.node.messages.control import (
    AdapterLoaded,
    Heartbeat,
    LoadAdapter,
    Prefill,
    Refused,
    Register,
    Registered,
    Reserve,
    Tokens,
)

Struct = TypeVar("Struct", bound=msgspec.Struct)

OLDEST_VERSION = PROTOCOL_VERSION - 1


class NotInVersion(Exception):
    """The message means something that a peer of the version before does not know."""


@dataclass(frozen=True, slots=True)
class NewField:
    """A field of a message that this version has added, `sampling.seed` for one of a value inside it."""

    path: str
    needed: bool = False
    """Without it, unless it has its default, the message would mean something else."""


DISPATCH_FIELDS = (
    NewField("body.speculate"),
    NewField("body.prediction_ids"),
    NewField("body.adapter", needed=True),
)
NEW_FIELDS: dict[type[Message], tuple[NewField, ...]] = {
    Register: (NewField("revision"), NewField("max_loras"), NewField("max_lora_rank")),
    Registered: (NewField("version"), NewField("peers")),
    Refused: (NewField("version"),),
    Heartbeat: (NewField("orphaned"), NewField("load.adapters"), NewField("load.adapters_in_memory")),
    Prefill: DISPATCH_FIELDS,
    Reserve: DISPATCH_FIELDS,
    Tokens: (NewField("accepted_prediction"),),
}
NEW_MESSAGES: tuple[type[Message], ...] = (LoadAdapter, AdapterLoaded)
NEW_VALUES: dict[type[Message], dict[str, tuple[str, ...]]] = {Register: {"role": ("mixed",)}}
"""Of fields that the version before had without them."""


def version_error(version: int) -> str:
    """Why a node that speaks this version cannot join, or ""."""
    if OLDEST_VERSION <= version <= PROTOCOL_VERSION:
        return ""
    return f"protocol version {version}, this proxy speaks {OLDEST_VERSION} and {PROTOCOL_VERSION}"


def written_for(version: int, message: Message) -> Message:
    """The message as a peer of this version reads it. Raises NotInVersion where that would change its meaning.

    The result is for the encoder alone, which leaves out the fields that are UNSET.
    """
    if version >= PROTOCOL_VERSION:
        return message
    if isinstance(message, NEW_MESSAGES):
        raise NotInVersion(f"a peer of protocol version {OLDEST_VERSION} knows no {type(message).__name__}")
    for name, values in NEW_VALUES.get(type(message), {}).items():
        if getattr(message, name) in values:
            raise NotInVersion(f"a peer of protocol version {OLDEST_VERSION} knows no {name} {getattr(message, name)}")
    for field in NEW_FIELDS.get(type(message), ()):
        message = _without(message, field.path.split("."), field)
    return message


def _without(value: Struct, path: Sequence[str], field: NewField) -> Struct:
    name, *inner = path
    current = getattr(value, name)
    if inner:
        return replace(value, **{name: _without(current, inner, field)}) if current is not None else value
    if field.needed and current != _default(value, name):
        raise NotInVersion(f"a worker of protocol version {OLDEST_VERSION} knows no {field.path}")
    return replace(value, **{name: UNSET})


def _default(value: msgspec.Struct, name: str) -> object:
    return next(each for each in fields(value) if each.name == name).default
