"""Messages between a prefill and a decode worker: one KV transfer, from the first offer to the last acknowledgement.

Every message about a transfer carries `transfer_id`, which the receiver chooses at random for one attempt of one
request, so that a late message of an old attempt matches no transfer.

    prefill -> decode  Hello, Offer, Valid, Finish, Renewed, Abort, Aborted
    decode -> prefill  Welcome, Grant, Accept, Validate, Renew, Ack, Abort, Aborted
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from baton.node.messages.base import (
    MAX_OFFER_BLOCKS,
    BlockId,
    Count,
    Message,
    Name,
    Seconds,
    Small,
    Text,
    TokenId,
    TransferId,
)
from baton.node.messages.control import Logprob

TRANSFER_VERSION = 3
"""Of the messages below and of the data planes. Workers of different versions exchange no KV: with a new one goes a new
FORMAT_VERSION of namespaces (kvtransfer/blocks/hashing.py), so that no proxy pairs them."""


class PlaneAddress(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The address of one end of a data plane; only the plane of that name reads `address`."""

    plane: Name
    host: Name
    """Identity of the machine: planes that need one host compare it."""
    address: Text = ""


# ---- prefill <-> decode: transfer -------------------------------------------------------------------------------


class Hello(Message, tag="Hello", kw_only=True):
    """Prefill to decode, once a connection: its namespace and planes; retransmitted until answered."""

    version: Small = TRANSFER_VERSION
    worker: Name
    """Endpoint identity, `worker/incarnation`."""
    namespace: Annotated[bytes, Meta(min_length=32, max_length=32)]
    planes: Annotated[tuple[PlaneAddress, ...], Meta(max_length=16)]


class Welcome(Message, tag="Welcome", kw_only=True):
    """The answer to Hello: the plane that this pair will use."""

    worker: Name
    plane: PlaneAddress


class Grant(Message, tag="Grant", kw_only=True):
    """Decode to prefill: blocks are reserved; those before `first_block` are not transferred."""

    transfer_id: TransferId
    request_id: Name
    attempt: Small
    first_block: Count
    num_blocks: Count
    """Blocks of the whole sequence; [first_block, num_blocks) are transferred."""
    lease_s: Seconds


class Offer(Message, tag="Offer", kw_only=True):
    """Prefill to decode: blocks [first_block, first_block + len(source)) are computed and held under the lease."""

    transfer_id: TransferId
    seq: Count
    first_block: Count
    source: Annotated[tuple[BlockId, ...], Meta(min_length=1, max_length=MAX_OFFER_BLOCKS)]
    """Block ids in the sender's pool, for planes that pull."""
    digest: Annotated[bytes, Meta(min_length=8, max_length=16)]


class Accept(Message, tag="Accept", kw_only=True):
    """Decode to prefill: the receive of chunk `seq` is posted, send it. `retry` > 0 requests it again."""

    transfer_id: TransferId
    seq: Count
    retry: Annotated[int, Meta(ge=0, le=16)] = 0


class Validate(Message, tag="Validate", kw_only=True):
    """Decode to prefill, on planes that pull: chunk `seq` is copied; confirm that the lease held until now."""

    transfer_id: TransferId
    seq: Count
    retry: Annotated[int, Meta(ge=0, le=16)] = 0


class Valid(Message, tag="Valid", kw_only=True):
    """Prefill to decode: the blocks of chunk `seq` were held throughout. Without this message they were not."""

    transfer_id: TransferId
    seq: Count
    retry: Annotated[int, Meta(ge=0, le=16)] = 0


class Finish(Message, tag="Finish", kw_only=True):
    """Prefill to decode: all chunks are offered, and the first token. Retransmitted until acknowledged."""

    transfer_id: TransferId
    num_chunks: Count
    token_id: TokenId
    logprob: Logprob | None = None
    waited_s: Seconds = 0.0
    """From the first token to the first Finish: the time in which decode had not granted the transfer."""


class Renew(Message, tag="Renew", kw_only=True):
    """Decode to prefill: renew the lease of these transfers."""

    transfer_ids: Annotated[tuple[TransferId, ...], Meta(max_length=4096)]


class Renewed(Message, tag="Renewed", kw_only=True):
    """Prefill to decode: the answer to Renew, and to a Grant where nothing can be offered yet: the prompt is queued or
    computed. Where it stays away the link is cut, whatever the heartbeats to the proxy say."""

    transfer_id: TransferId


class Ack(Message, tag="Ack", kw_only=True):
    """Decode to prefill: every block has arrived and is verified; the sender may free its blocks."""

    transfer_id: TransferId


class Abort(Message, tag="Abort", kw_only=True):
    """Either side: this transfer is over. Answered with Aborted, also by a peer that does not know it."""

    transfer_id: TransferId
    reason: Text
    cancelled: bool = False
    """Not a failure: the KV is no longer needed."""


class Aborted(Message, tag="Aborted", kw_only=True):
    """The sender of this message no longer reads or writes any block of the transfer."""

    transfer_id: TransferId
