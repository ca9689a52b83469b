"""Outputs read from answers: token ids, order, log probabilities in both shapes, answers that lack something."""

from __future__ import annotations

import json
from typing import Any

import pytest

from baton.offline.outputs import RankedLogprob, failed_output, failure_message, request_output


def choice(**fields: Any) -> dict[str, Any]:
    return {"index": 0, "text": "a", "finish_reason": "stop", "token_ids": [5], "prompt_token_ids": [1], **fields}


def read(*choices: dict[str, Any], num_top: int = 0, **fields: Any) -> Any:
    body = json.dumps({"id": "x", "choices": choices, **fields}).encode()
    return request_output("0", "p", body, num_top, lambda token: f"<{token}>")


def test_a_completion() -> None:
    usage = {"prompt_tokens": 1, "prompt_tokens_details": {"cached_tokens": 16}}
    output = read(choice(index=1, text="b", stop_reason="b"), choice(), usage=usage)
    assert [(answer.index, answer.text, answer.token_ids) for answer in output.outputs] == [
        (0, "a", [5]),
        (1, "b", [5]),
    ]
    assert output.outputs[1].stop_reason == "b" and output.outputs[1].finish_reason == "stop"
    assert (output.prompt, output.prompt_token_ids, output.num_cached_tokens) == ("p", [1], 16)
    assert output.finished and output.error is None
    assert output.outputs[0].logprobs is None and output.outputs[0].cumulative_logprob is None


def test_a_chat_has_its_prompts_ids_at_the_top() -> None:
    message = {"role": "assistant", "content": "hi"}
    output = read({"index": 0, "message": message, "token_ids": [5], "finish_reason": "stop"}, prompt_token_ids=[1, 2])
    assert output.prompt_token_ids == [1, 2] and output.outputs[0].text == "hi"


def test_log_probabilities_of_a_completion() -> None:
    """The drawn token stands beside the likeliest; counted as one of them it would have a wrong rank."""
    logprobs = {
        "tokens": ["token_id:5", "token_id:6"],
        "token_logprobs": [-0.5, -4.0],
        "top_logprobs": [{"token_id:5": -0.5}, {"token_id:7": -0.25, "token_id:6": -4.0}],
        "text_offset": [0, 1],
    }
    answer = read(choice(token_ids=[5, 6], logprobs=logprobs), num_top=1).outputs[0]
    assert answer.cumulative_logprob == -4.5
    assert answer.logprobs == [
        {5: RankedLogprob(-0.5, 1, "<5>")},
        {6: RankedLogprob(-4.0, None, "<6>"), 7: RankedLogprob(-0.25, 1, "<7>")},
    ]
    assert list(answer.logprobs[1]) == [6, 7]


def test_log_probabilities_of_a_chat() -> None:
    top = [{"token": "token_id:8", "logprob": -0.1, "bytes": []}, {"token": "token_id:5", "logprob": -0.5, "bytes": []}]
    content = [{"token": "token_id:5", "logprob": -0.5, "bytes": [97], "top_logprobs": top}]
    message = {"role": "assistant", "content": "a"}
    answer = read(choice(message=message, logprobs={"content": content, "refusal": None}), num_top=2).outputs[0]
    assert answer.logprobs == [{5: RankedLogprob(-0.5, 2, "<5>"), 8: RankedLogprob(-0.1, 1, "<8>")}]


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        b"{}",
        b'{"choices": []}',
        b'{"choices": [{"index": 0, "text": "a", "finish_reason": "stop"}]}',
        b'{"choices": [{"index": 0, "text": "a", "prompt_token_ids": [1]}]}',
    ],
)
def test_an_answer_without_token_ids_is_an_error(body: bytes) -> None:
    """Ids from tokenising the text again would be wrong now and then, without any sign."""
    with pytest.raises(ValueError):
        request_output("0", None, body)


def test_log_probabilities_of_texts_are_an_error() -> None:
    """Two tokens with one text would become one."""
    logprobs = {"tokens": ["a"], "token_logprobs": [-0.5], "top_logprobs": [{"a": -0.5}]}
    with pytest.raises(ValueError, match="return_tokens_as_token_ids"):
        read(choice(logprobs=logprobs))


def test_a_failed_prompt_has_as_many_outputs_as_asked_for() -> None:
    """A program that reads outputs[1] must see the error, and not an IndexError."""
    output = failed_output("3", None, (1, 2), 2, "HTTP 400: no")
    assert [(answer.index, answer.finish_reason) for answer in output.outputs] == [(0, "error"), (1, "error")]
    assert output.error == "HTTP 400: no" and output.prompt_token_ids == [1, 2]


def test_messages_of_failures() -> None:
    assert failure_message(400, b'{"error": {"message": "no", "code": null}}') == "HTTP 400: no"
    assert failure_message(502, b"<html>") == "HTTP 502"


def test_prompt_logprobs_are_read_by_token_id():
    """Guards against entries of another token, and a first one that is dropped, which shifts all others."""
    body = (
        b'{"choices": [{"index": 0, "text": "", "token_ids": [], "prompt_token_ids": [5, 7], "prompt_logprobs": '
        b'[null, {"7": {"logprob": -1.5, "rank": 4, "decoded_token": " a"}}]}]}'
    )
    output = request_output("0", "x", body)
    assert output.prompt_logprobs == [None, {7: RankedLogprob(-1.5, 4, " a")}]
