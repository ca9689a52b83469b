"""Who may use which name on a ROUTER: the connection ids that dealers choose, and which of them holds each name.

A connection id is `name#suffix`. The suffix is random to all but the two ends, and stays the same when a dealer
connects to an address again: so ROUTER_HANDOVER lets a peer replace its own dead connection, which the ROUTER may
still hold when the new one arrives, and lets nothing else take it. A name belongs to the first connection id that
states it, with the role of its key; what arrives under that name from another one is rejected. On a link in the clear
no role is known, and nothing proves that the first was genuine.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

from baton.node.credentials import NodeRole

MAX_NAMES = 16_384
"""The name that was heard least recently is forgotten first; it is learned again when it is heard."""
SUFFIX_BYTES = 16
SUFFIX_CHARACTERS = 1 + 2 * SUFFIX_BYTES


class NameTaken(Exception):
    """Another connection holds the name."""


@dataclass(frozen=True, slots=True)
class NameHolder:
    """The peer at the other end of a connection."""

    name: str
    role: NodeRole | None
    """None: the link is in the clear."""


def connection_id(name: str, secret: bytes, address: str) -> str:
    """The id of a connection to `address`; another address does not learn it. `secret` has at most 64 bytes."""
    suffix = hashlib.blake2b(address.encode(), key=secret, digest_size=SUFFIX_BYTES).hexdigest()
    return f"{name}#{suffix}"


def stated_name(connection: bytes) -> str:
    """The name in a connection id. Raises UnicodeDecodeError if it is no text."""
    name, mark, _ = connection.rpartition(b"#")
    return (name if mark else connection).decode()


class NameHolders:
    """Which connection holds each name."""

    def __init__(self, limit: int = MAX_NAMES) -> None:
        self._limit = limit
        self._holders: OrderedDict[bytes, NameHolder] = OrderedDict()
        self._connections: dict[str, bytes] = {}
        self._reserved: set[str] = set()

    def find(self, connection: bytes) -> NameHolder | None:
        """The peer from which a message came; None if `learn` must say."""
        holder = self._holders.get(connection)
        if holder is not None:
            self._holders.move_to_end(connection)
        return holder

    def learn(self, connection: bytes, role: NodeRole | None) -> NameHolder:
        """The peer at a new connection. Raises NameTaken, or UnicodeDecodeError for an id that is no text."""
        name = stated_name(connection)
        if name in self._connections or name in self._reserved:
            raise NameTaken("an incoming peer uses the name of another connection")
        if len(self._holders) >= self._limit:
            _, forgotten = self._holders.popitem(last=False)
            del self._connections[forgotten.name]
        holder = self._holders[connection] = NameHolder(name, role)
        self._connections[name] = connection
        return holder

    def connection_of(self, name: str) -> bytes | None:
        """The connection that holds the name; None if none was heard under it."""
        return self._connections.get(name)

    def forget(self, name: str) -> None:
        """Its connection does not reach it any more; one is learned again when it is heard."""
        if (connection := self._connections.pop(name, None)) is not None:
            del self._holders[connection]

    def reserve(self, name: str) -> None:
        """From now on no incoming connection has this name."""
        self._reserved.add(name)
        self.forget(name)

    def release(self, name: str) -> None:
        self._reserved.discard(name)
