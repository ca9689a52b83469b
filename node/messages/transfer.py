"""Messages between a prefill and a decode worker: one transfer of KV, from the first offer to the last acknowledgement.

Every message about a transfer carries `transfer_id`, which the receiver drew at random for one attempt of one request,
so a late message of an old attempt matches no transfer.

    prefill -> decode  Hello, Offer, Valid, Finish, Abort, Aborted
    decode -> prefill  Welcome, Grant, Accept, Validate, Renew, Ack, Abort, Aborted
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from baton.node.messages.base import (
    MAX_OFFER_BLOCKS,
    PROTOCOL_VERSION,
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


class PlaneAddress(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How one end of a data plane is reached; only the plane of that name reads `address`."""

    plane: Name
    host: Name
    """Identity of the machine: planes that need one host compare it."""
    address: Text = ""


# ---- prefill <-> decode: transfer -------------------------------------------------------------------------------


class Hello(Message, tag="Hello", kw_only=True):
    """Prefill introduces itself to a decode worker, once a connection; repeated until answered."""

    version: Small = PROTOCOL_VERSION
    worker: Name
    """Endpoint identity, `worker/incarnation`."""
    namespace: Annotated[bytes, Meta(min_length=32, max_length=32)]
    planes: Annotated[tuple[PlaneAddress, ...], Meta(max_length=16)]


class Welcome(Message, tag="Welcome", kw_only=True):
    """Decode's answer: the plane that this pair will use."""

    worker: Name
    plane: PlaneAddress


class Grant(Message, tag="Grant", kw_only=True):
    """Decode to prefill: the reservation stands; blocks before `first_block` need not travel."""

    transfer_id: TransferId
    request_id: Name
    attempt: Small
    first_block: Count
    num_blocks: Count
    """Blocks of the whole sequence, so [first_block, num_blocks) will travel."""
    lease_s: Seconds


class Offer(Message, tag="Offer", kw_only=True):
    """Prefill: blocks [first_block, first_block + len(source)) are computed and held under the lease."""

    transfer_id: TransferId
    seq: Count
    first_block: Count
    source: Annotated[tuple[Count, ...], Meta(min_length=1, max_length=MAX_OFFER_BLOCKS)]
    """Block ids in the sender's pool, for planes that pull."""
    digest: Annotated[bytes, Meta(min_length=8, max_length=16)]


class Accept(Message, tag="Accept", kw_only=True):
    """Decode: the receive of chunk `seq` is posted; this is the credit to send it. `retry` > 0 asks for it anew."""

    transfer_id: TransferId
    seq: Count
    retry: Annotated[int, Meta(ge=0, le=16)] = 0


class Validate(Message, tag="Validate", kw_only=True):
    """Decode, on planes that pull: I have copied chunk `seq`; did the lease hold until now?"""

    transfer_id: TransferId
    seq: Count
    retry: Annotated[int, Meta(ge=0, le=16)] = 0


class Valid(Message, tag="Valid", kw_only=True):
    """Prefill: the blocks of chunk `seq` were held all along. (Silence or Aborted means: they were not.)"""

    transfer_id: TransferId
    seq: Count
    retry: Annotated[int, Meta(ge=0, le=16)] = 0


class Finish(Message, tag="Finish", kw_only=True):
    """Prefill: all chunks are offered; with them goes the first token. Repeated until acknowledged."""

    transfer_id: TransferId
    num_chunks: Count
    token_id: TokenId
    logprob: Logprob | None = None
    waited_s: Seconds = 0.0
    """From the first token to the first time that this was said: decode had not granted the transfer before."""


class Renew(Message, tag="Renew", kw_only=True):
    """Decode: the lease of these transfers starts anew."""

    transfer_ids: Annotated[tuple[TransferId, ...], Meta(max_length=4096)]


class Ack(Message, tag="Ack", kw_only=True):
    """Decode: every block has arrived and is verified; the sender may free its blocks."""

    transfer_id: TransferId


class Abort(Message, tag="Abort", kw_only=True):
    """Either side: this transfer is over. Answered with Aborted, also by one who never knew it."""

    transfer_id: TransferId
    reason: Text
    cancelled: bool = False
    """Nothing went wrong: nobody wants the KV any more."""


class Aborted(Message, tag="Aborted", kw_only=True):
    """The sender of this touches nothing of the transfer any more."""

    transfer_id: TransferId
