"""Which role of node sends which messages to which: an endpoint drops what its peer's role does not send.

Whether a message makes sense in its place (an unknown request, another worker's name) is the receiver's to decide.
"""

from __future__ import annotations

from collections.abc import Mapping

from baton.node.credentials import NodeRole
from baton.node.messages.base import Message
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
from baton.node.messages.store import (
    Alive,
    Attach,
    Attached,
    Beat,
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
    Put,
    Release,
    Touch,
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

_Types = tuple[type[Message], ...]

_MEMBER: _Types = (Heartbeat, Goodbye, KvEvents, KvSnapshot)
_WORKER: _Types = (*_MEMBER, Register, Busy, PromptLogprobs, Tokens, Bundle, Failed, Cancelled, AdapterLoaded)
_TO_MEMBER: _Types = (Registered, Refused, Ping, Rejoin, KvReplay)
_TO_WORKER: _Types = (*_TO_MEMBER, Drain, Cancel, LoadAdapter)
_TO_STORE: _Types = (Attach, Beat, Lookup, Fetch, Put, Commit, Release, Touch, Damaged)
_FROM_STORE: _Types = (Attached, Detached, Alive, Found, Fetched, Granted)

_FROM_PREFILL: _Types = (Hello, Offer, Valid, Finish, Renewed, Abort, Aborted)
_FROM_DECODE: _Types = (Welcome, Refused, Grant, Accept, Validate, Renew, Ack, Abort, Aborted)

SENT: Mapping[tuple[NodeRole, NodeRole], frozenset[type[Message]]] = {
    ("prefill", "proxy"): frozenset((*_WORKER, HandedOver)),
    ("decode", "proxy"): frozenset((*_WORKER, Reserved)),
    ("mixed", "proxy"): frozenset((*_WORKER, HandedOver, Reserved)),
    ("store", "proxy"): frozenset((*_MEMBER, RegisterStore)),
    ("proxy", "prefill"): frozenset((*_TO_WORKER, Prefill)),
    ("proxy", "decode"): frozenset((*_TO_WORKER, Reserve)),
    ("proxy", "mixed"): frozenset((*_TO_WORKER, Prefill, Reserve)),
    ("proxy", "store"): frozenset(_TO_MEMBER),
    ("prefill", "decode"): frozenset(_FROM_PREFILL),
    ("decode", "prefill"): frozenset(_FROM_DECODE),
    ("mixed", "mixed"): frozenset((*_FROM_PREFILL, *_FROM_DECODE)),
    ("prefill", "store"): frozenset(_TO_STORE),
    ("decode", "store"): frozenset(_TO_STORE),
    ("mixed", "store"): frozenset(_TO_STORE),
    ("store", "prefill"): frozenset(_FROM_STORE),
    ("store", "decode"): frozenset(_FROM_STORE),
    ("store", "mixed"): frozenset(_FROM_STORE),
    ("store", "store"): frozenset((PeerLookup, PeerFound, PeerGet, PeerData)),
}
"""By sender and receiver."""

_NOTHING: frozenset[type[Message]] = frozenset()


def sender_error(sender: NodeRole, receiver: NodeRole, message: Message) -> str:
    """Why this role does not send this message to that one; empty where it does."""
    if type(message) not in SENT.get((sender, receiver), _NOTHING):
        return f"{type(message).__name__} from a {sender} node"
    if isinstance(message, Register) and message.role != sender:
        return f"a {sender} node registers for the role of {message.role}"
    return ""
