"""The interface of an endpoint: messages in, messages out. Knows no socket."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from baton.node.messages.base import Message


class Line(Protocol):
    """An endpoint as its owner uses it: node.endpoint.Endpoint, or its stand-in in the simulator."""

    def receive(self, timeout_s: float, also: Iterable[object] = ()) -> list[tuple[str, Message]]: ...

    def send(self, peer: str, message: Message) -> bool: ...

    def wake(self) -> None: ...

    def linger(self) -> None: ...

    def close(self) -> None: ...
