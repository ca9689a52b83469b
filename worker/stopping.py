"""The rule by which a sequence ends, in one place, since prefill draws the first token and decode the others."""

from __future__ import annotations

from baton.node.messages.base import FinishReason
from baton.node.messages.control import SamplingSpec


def finish_of(
    token_id: int, sampling: SamplingSpec, num_generated: int, num_tokens: int, max_model_len: int
) -> FinishReason:
    """ "stop", "length" or "" after `token_id` became generated token number `num_generated` (the first is 1).

    `num_tokens` counts prompt and generated tokens with it. min_tokens is kept by the sampler, which does not draw a
    stop token before; a stop token within min_tokens (by logit_bias, say) does not end the sequence either. Where a
    grammar says where the text may end, min_tokens does not count.
    """
    ends = sampling.grammar is not None or num_generated > sampling.min_tokens
    if ends and token_id in sampling.stop_token_ids:
        return "stop"
    return "length" if is_last(sampling, num_generated, num_tokens, max_model_len) else ""


def is_last(sampling: SamplingSpec, num_generated: int, num_tokens: int, max_model_len: int) -> bool:
    """Whether generated token number `num_generated` is the last, whatever it is."""
    return num_generated >= sampling.max_tokens or num_tokens >= max_model_len
