"""What the encoders make of values that the golden answers do not have."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.node.messages.control import SamplingSpec
from baton.proxy.formats.events import CallArguments, ReasoningText
from baton.proxy.http.encoder import AnswerHeader
from baton.proxy.http.encoders import ChatEncoder, CompletionEncoder
from baton.proxy.http.events import ChoiceEnd, Content, TokenLogprob, TokenUsage

HEADER = AnswerHeader(
    id="a",
    created=0,
    model="m",
    logprobs=True,
    token_ids=False,
    include_usage=False,
    prompt_tokens=1,
    sampling=SamplingSpec(max_tokens=1),
)


def test_of_tokens_with_one_text_the_likeliest_counts() -> None:
    """Guards against the rare one's probability under the text, where a tokenizer spells a character twice."""
    top = ((b"y", -0.1), (b",", -2.5), (b",", -5.5))
    drawn = TokenLogprob(b",", -5.5, top, 0)
    events = [Content(",", (drawn,)), ChoiceEnd("stop")]
    shown = json.loads(CompletionEncoder(HEADER).whole([events], TokenUsage(1, 1, 0)))["choices"][0]["logprobs"]
    assert shown["top_logprobs"] == [{"y": -0.1, ",": -2.5}]
    assert shown["token_logprobs"] == [-5.5]


@pytest.mark.parametrize("make", [CompletionEncoder, ChatEncoder])
@pytest.mark.parametrize(
    "asked",
    [{}, {"include_usage": True}, {"logprobs": True}, {"token_ids": True}, {"id": '"text":"x"', "model": '\\"'}],
)
@given(texts=st.lists(st.text(), max_size=5), index=st.integers(0, 3))
def test_a_plain_chunk_is_as_any_other(
    make: type[CompletionEncoder | ChatEncoder], asked: dict[str, Any], texts: list[str], index: int
) -> None:
    """Guards the bytes of chunks that are put together around their text, against those that are encoded as a whole."""
    encoder = make(replace(HEADER, **{"logprobs": False, **asked}))
    for text in texts:
        more = (ReasoningText(text), CallArguments(0, text), CallArguments(12, text)) if make is ChatEncoder else ()
        for event in (Content(text), *more):
            assert encoder.frames(index, [event]) == encoder.any_frames(index, [event])
        ended = encoder.frames(index, [Content(text), ChoiceEnd("stop")])
        assert json.loads(ended.removeprefix(b"data: "))["choices"][0]["finish_reason"] == "stop"
