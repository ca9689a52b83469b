"""What each sampling parameter asks of a draw, for both devices: which rows need what, with which numbers. No torch.

The order is vLLM's: log probabilities are taken from the raw logits; then allowed_token_ids or a grammar's mask,
logit_bias, bad_words, the stop tokens that min_tokens forbids, and penalties edit them (what is forbidden stays so,
whatever follows); then the argmax (temperature 0), or temperature, min_p, top_k, top_p and a draw by Gumbel-max.
models.cpu.sampler carries it out with tensors, kernels.triton.sampling_rows from a table of numbers a slot.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from baton.node.messages.control import SamplingSpec

GREEDY_BELOW = 1e-5  # temperatures under this are 0, as in vLLM: dividing by them would only overflow

EVERYTHING = SamplingSpec(
    max_tokens=2, min_tokens=2, top_p=0.5, top_k=5, min_p=0.1, presence_penalty=1.0, frequency_penalty=1.0,
    repetition_penalty=1.1, logit_bias=((0, 1.0),), logprobs=True, top_logprobs=2, stop_token_ids=(0,),
    allowed_token_ids=(0, 1, 2), bad_words=((1, 2),),
)  # fmt: skip
"""Parameters that take every path of drawing."""


class DrawRules(NamedTuple):
    """One row's draw; a parameter that asks for nothing has the number that changes nothing."""

    temperature: float
    """0: greedy."""
    seed: int
    bias: tuple[tuple[int, float], ...]
    """Tokens of the vocabulary, each once."""
    allowed: tuple[int, ...]
    """Tokens of the vocabulary; empty: all."""
    is_masked: bool
    """A grammar names the tokens that may be drawn, at each draw anew."""
    bad_words: tuple[tuple[int, ...], ...]
    """Sequences of tokens of the vocabulary, whose last is not drawn after the others."""
    forbidden: tuple[int, ...]
    """Tokens of the vocabulary that are not drawn until `min_tokens` are generated."""
    min_tokens: int
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    min_p: float
    """0: off. Greedy rows have no filters."""
    top_k: int
    """0: off."""
    top_p: float
    """1: off."""
    num_top: int | None
    """Likeliest tokens to name with the log probability; None: no log probability."""

    @property
    def is_random(self) -> bool:
        return self.temperature > 0.0

    @property
    def is_penalised(self) -> bool:
        """Counts of tokens change the logits."""
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0

    def edits_logits(self, num_generated: int) -> bool:
        """Before the draw of the token that follows so many generated ones."""
        always = self.is_masked or self.bias or self.allowed or self.bad_words or self.is_penalised
        return bool(always or (self.forbidden and num_generated < self.min_tokens))

    @property
    def needs_more_than_temperature(self) -> bool:
        """At any of its tokens."""
        filters = self.min_p > 0.0 or self.top_k > 0 or self.top_p < 1.0
        return filters or self.edits_logits(0)


@lru_cache(maxsize=4096)  # a runner asks at each of a row's tokens
def rules_of(sampling: SamplingSpec, vocab_size: int) -> DrawRules:
    """The draw that these parameters ask of a model with so many tokens."""
    is_random = sampling.temperature >= GREEDY_BELOW
    bias: dict[int, float] = {}
    for token, value in sampling.logit_bias:
        if token < vocab_size:
            bias[token] = bias.get(token, 0.0) + value
    return DrawRules(
        temperature=sampling.temperature if is_random else 0.0,
        seed=sampling.seed,
        bias=tuple(bias.items()),
        allowed=tuple(token for token in sampling.allowed_token_ids if token < vocab_size),
        is_masked=sampling.grammar is not None,
        bad_words=tuple(word for word in sampling.bad_words if max(word) < vocab_size),
        forbidden=tuple(token for token in sampling.stop_token_ids if token < vocab_size)
        if sampling.min_tokens and sampling.grammar is None
        else (),
        min_tokens=sampling.min_tokens,
        repetition_penalty=sampling.repetition_penalty,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        min_p=sampling.min_p if is_random else 0.0,
        top_k=sampling.top_k if is_random and sampling.top_k < vocab_size else 0,
        top_p=sampling.top_p if is_random else 1.0,
        num_top=min(sampling.top_logprobs, vocab_size) if sampling.logprobs else None,
    )
