"""What the encoders make of values that the golden answers do not have."""

from __future__ import annotations

import json

from baton.proxy.http.encoders import AnswerHeader, CompletionEncoder
from baton.proxy.http.events import ChoiceText, TokenLogprob, TokenUsage

HEADER = AnswerHeader(id="a", created=0, model="m", logprobs=True, token_ids=False, include_usage=False)


def test_of_tokens_with_one_text_the_likeliest_counts() -> None:
    """Guards against the rare one's probability under the text, where a tokenizer spells a character twice."""
    top = ((b"y", -0.1), (b",", -2.5), (b",", -5.5))
    drawn = TokenLogprob(b",", -5.5, top, 0)
    choice = ChoiceText(0, ",", (drawn,), "stop")
    shown = json.loads(CompletionEncoder(HEADER).whole([choice], TokenUsage(1, 1, 0)))["choices"][0]["logprobs"]
    assert shown["top_logprobs"] == [{"y": -0.1, ",": -2.5}]
    assert shown["token_logprobs"] == [-5.5]
