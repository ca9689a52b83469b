"""What both kinds of worker say and check about a leg: which cannot be, whom a Cancel means, how a leg ends."""

from __future__ import annotations

from baton.node.leg import LegKey
from baton.node.messages.control import Busy, Cancel, DispatchBody, Failed


def validation_error(body: DispatchBody, *, max_model_len: int, vocab_size: int, block_tokens: int) -> str:
    """The reason why no worker of this model can serve the request, or ""."""
    num_tokens = len(body.token_ids)
    if not 0 < num_tokens < max_model_len:
        return f"{num_tokens} tokens; this worker takes 1 to {max_model_len - 1}"
    if not 0 < body.prompt_len <= num_tokens:
        return f"a prompt of {body.prompt_len} in {num_tokens} tokens"
    if max(body.token_ids) >= vocab_size:
        return "a token id is outside the vocabulary"
    if len(body.block_hashes) > num_tokens // block_tokens:
        return "more block hashes than full blocks"
    return ""


def cancel_matches(cancel: Cancel, leg: LegKey) -> bool:
    """Whether `cancel` ends this leg: its request, and an attempt up to the one it names."""
    return leg.request_id == cancel.request_id and leg.attempt <= cancel.attempt


def failed(leg: LegKey, reason: str, *, retryable: bool) -> Failed:
    return Failed(request_id=leg.request_id, attempt=leg.attempt, reason=reason, retryable=retryable)


def busy(leg: LegKey, reason: str) -> Busy:
    return Busy(request_id=leg.request_id, attempt=leg.attempt, reason=reason)
