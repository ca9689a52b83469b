"""What each parameter asks of a draw. That both devices do it, and alike, their samplers' tests show."""

from __future__ import annotations

import pytest

from baton.models.sampling_rules import EVERYTHING, GREEDY_BELOW, rules_of
from baton.node.messages.control import SamplingSpec

VOCAB = 50


def params(**fields) -> SamplingSpec:
    return SamplingSpec(**{"max_tokens": 9, **fields})


@pytest.mark.parametrize(
    ("fields", "edits", "needs_more"),
    [
        ({}, False, False),
        ({"temperature": 0.7, "seed": 5, "logprobs": True, "top_logprobs": 3}, False, False),
        ({"top_p": 0.9}, False, True),
        ({"top_k": VOCAB - 1}, False, True),
        ({"min_p": 0.1}, False, True),
        ({"top_k": VOCAB}, False, False),  # keeps all
        ({"temperature": 0.0, "top_p": 0.9, "top_k": 5, "min_p": 0.1}, False, False),  # the likeliest passes any filter
        ({"temperature": GREEDY_BELOW / 2, "top_k": 5}, False, False),
        ({"logit_bias": ((3, 1.0),)}, True, True),
        ({"logit_bias": ((VOCAB, 1.0),)}, False, False),  # no token of the model's
        ({"min_tokens": 2, "stop_token_ids": (4,)}, True, True),
        ({"min_tokens": 2}, False, False),  # nothing is forbidden
        ({"stop_token_ids": (4,)}, False, False),
        ({"allowed_token_ids": (3, 4)}, True, True),
        ({"bad_words": ((3, 4),)}, True, True),
        ({"bad_words": ((3, VOCAB),)}, False, False),  # cannot be generated
        ({"repetition_penalty": 1.1}, True, True),
        ({"frequency_penalty": -0.1}, True, True),
        ({"presence_penalty": 0.1, "temperature": 0.0}, True, True),
    ],
)
def test_which_rows_need_what(fields, edits, needs_more):
    """Guards against a row drawn as if a temperature were all, and against work for parameters that do nothing."""
    rules = rules_of(params(**fields), VOCAB)
    assert (rules.edits_logits(0), rules.needs_more_than_temperature) == (edits, needs_more)


def test_stops_are_forbidden_until_the_minimum_is_generated():
    rules = rules_of(params(min_tokens=3, stop_token_ids=(4, VOCAB)), VOCAB)
    assert rules.forbidden == (4,)
    assert [rules.edits_logits(generated) for generated in (0, 2, 3)] == [True, True, False]


def test_biases_of_one_token_are_summed():
    """Guards a device's table, in which a token may stand once."""
    assert rules_of(params(logit_bias=((3, 1.5), (7, 1.0), (3, -0.5))), VOCAB).bias == ((3, 1.0), (7, 1.0))


def test_the_example_of_everything_takes_every_path():
    """Guards a start against kernels that the first request would have to wait for: a new parameter belongs into
    EVERYTHING, which a runner warms up with."""
    plain = SamplingSpec(max_tokens=1)
    # Prompts are scored by a launch of their own; masks are drawn with as allowed tokens are.
    harmless = {"max_tokens", "temperature", "seed", "prompt_logprobs", "grammar", "is_masked"}
    unset = {name for name in plain.__struct_fields__ if getattr(plain, name) == getattr(EVERYTHING, name)}
    assert unset <= harmless
    rules, nothing = rules_of(EVERYTHING, VOCAB), rules_of(plain, VOCAB)
    assert {name for name in rules._fields if getattr(rules, name) == getattr(nothing, name)} <= harmless
