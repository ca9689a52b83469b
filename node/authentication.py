"""Which peers a node's sockets let in: a thread that answers libzmq's questions about the keys of clients.

ZAP (RFC 27 of ZeroMQ): before a CURVE server accepts a client, libzmq asks a socket of the same context,
inproc://zeromq.zap.01. It is bound before any server is, and sockets.py lets no server go without an answer
(ZAP_ENFORCE_DOMAIN): if this thread ended, no new peer would be let in. A client that is let in gets its role as its
User-Id, which libzmq attaches to each of its messages.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import zmq

from baton.node.credentials import Keys, NodeRole

ADDRESS = "inproc://zeromq.zap.01"
DOMAIN = b"baton"
CONNECTS_TO: Mapping[NodeRole, frozenset[NodeRole]] = {
    "proxy": frozenset({"prefill", "decode", "mixed", "store"}),
    "prefill": frozenset({"decode"}),
    "decode": frozenset({"prefill"}),
    "mixed": frozenset({"mixed"}),
    "store": frozenset({"prefill", "decode", "mixed", "store"}),
    "stage": frozenset({"stage"}),
}
"""For each role of a server, the roles of its clients."""
_VERSION, _MECHANISM = b"1.0", b"CURVE"


class Authenticator:
    """Answers for all servers of one context, which are of one role, until the context is terminated."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], role: NodeRole, keys: Keys) -> None:
        self._keys = keys
        self._admitted = CONNECTS_TO[role]
        self._socket: zmq.Socket[bytes] = zmq.Context.shadow(context).socket(
            zmq.REP
        )  # which the context's owner does not close
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(ADDRESS)
        threading.Thread(target=self._run, name="authenticator", daemon=True).start()

    def _run(self) -> None:
        with self._socket as socket:
            while True:
                try:
                    socket.send_multipart(self.answer(socket.recv_multipart()))
                except zmq.ContextTerminated:
                    return

    def answer(self, request: Sequence[bytes]) -> list[bytes]:
        """The reply to a request: version, id, domain, address, identity, mechanism, key."""
        request_id = request[1] if len(request) > 1 else b""
        role = self._role_of(request)
        if role is None:
            return [_VERSION, request_id, b"400", b"no key that is let in here", b"", b""]
        return [_VERSION, request_id, b"200", b"OK", role.encode(), b""]

    def _role_of(self, request: Sequence[bytes]) -> NodeRole | None:
        if len(request) != 7 or request[0] != _VERSION or request[2] != DOMAIN or request[5] != _MECHANISM:
            return None
        role = self._keys.role_of(request[6])
        return role if role in self._admitted else None
