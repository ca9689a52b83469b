"""Sampling parameters: vLLM's names and defaults, refused values, and what is sent of them."""

from __future__ import annotations

from typing import Any

import pytest

from baton.offline.sampling import SamplingParams, StructuredOutputsParams, sampling_fields


def test_fields_of_a_completion() -> None:
    """A field that is not sent is the model's default, and not what the program asked for."""
    params = SamplingParams(
        temperature=0.5,
        seed=7,
        stop="END",
        stop_token_ids=[3],
        logit_bias={5: -1.5},
        allowed_token_ids=(4, 5),
        bad_words=["bad"],
        logprobs=2,
        ignore_eos=True,
        min_tokens=1,
    )
    assert sampling_fields(params, chat=False) == {
        "n": 1,
        "temperature": 0.5,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": 7,
        "max_tokens": 16,
        "min_tokens": 1,
        "stop": ["END"],
        "stop_token_ids": [3],
        "ignore_eos": True,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logit_bias": {"5": -1.5},
        "allowed_token_ids": [4, 5],
        "bad_words": ["bad"],
        "logprobs": 2,
        "return_tokens_as_token_ids": True,
        "skip_special_tokens": True,
    }


def test_a_form_is_sent_with_the_fields_that_are_given() -> None:
    """Guards a program of vLLM's against answers of any form; and against a second form that the server refuses."""
    form = StructuredOutputsParams(choice=("yes", "no"))
    fields = sampling_fields(SamplingParams(structured_outputs=form, skip_special_tokens=False), chat=True)
    assert fields["structured_outputs"] == {"choice": ["yes", "no"]} and fields["skip_special_tokens"] is False
    schema = {"type": "object"}
    fields = sampling_fields(SamplingParams(structured_outputs=StructuredOutputsParams(json=schema)), chat=False)
    assert fields["structured_outputs"] == {"json": schema}
    for wrong in ({}, {"regex": "a", "choice": ["a"]}, {"choice": "yes"}, {"json_object": False}):
        with pytest.raises(ValueError, match="must be"):
            StructuredOutputsParams(**wrong)  # type: ignore[arg-type]


def test_log_probabilities_of_a_chat_have_two_fields() -> None:
    """`logprobs: 2` is refused by the chat API."""
    fields = sampling_fields(SamplingParams(logprobs=2), chat=True)
    assert fields["logprobs"] is True and fields["top_logprobs"] == 2


def test_no_parameters_ask_for_the_defaults() -> None:
    assert sampling_fields(None, chat=False) == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "1"),
        ("top_p", -0.1),
        ("top_k", -2),
        ("min_p", 1.5),
        ("max_tokens", 0),
        ("max_tokens", True),
        ("logprobs", 21),
        ("presence_penalty", 3.0),
        ("repetition_penalty", 0.0),
        ("allowed_token_ids", []),
        ("bad_words", "word"),
        ("bad_words", ["", "word"]),
    ],
)
def test_a_wrong_value_is_refused_by_name(name: str, value: Any) -> None:
    """Found by the server, it would be an error for each of a million prompts."""
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})


def test_more_least_tokens_than_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="max_tokens must be at least 20"):
        SamplingParams(min_tokens=20)


def test_a_field_that_does_not_exist_is_refused_by_name() -> None:
    """Ignored, `best_of` would silently do nothing."""
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)  # type: ignore[call-arg]
