"""What `LLM` returns, under vLLM's names, and how it is read from an answer of /v1/completions or /v1/chat/completions.

Token ids come from the answer itself (`return_token_ids`), never from tokenising its text again, which can give others.
Source: the OpenAI API reference; vLLM's extra fields `token_ids`, `prompt_token_ids` and `stop_reason`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from baton.node.decoding import DECODE_ERRORS

TOKEN_ID_PREFIX = "token_id:"


@dataclass(frozen=True, slots=True)
class RankedLogprob:
    """The log probability of one token at one place."""

    logprob: float
    rank: int | None
    """1: the likeliest. None: the drawn token, where it is not among the likeliest that were asked for."""
    decoded_token: str | None = None
    """None where the model's tokenizer is not at hand."""


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One answer to a prompt."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    """Sum over the drawn tokens; None where no log probabilities were asked for."""
    logprobs: list[dict[int, RankedLogprob]] | None = None
    """For each drawn token: it and the likeliest, by token id."""
    finish_reason: str | None = None
    """"stop", "length", or "error"."""
    stop_reason: int | str | None = None
    """The stop string or token id that ended the answer; None for an end token of the model."""


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A prompt with its answers."""

    request_id: str
    prompt: str | None
    """As it was given; None for token ids and chats."""
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True
    num_cached_tokens: int = 0
    """Prompt tokens whose KV was found in a cache."""
    error: str | None = None
    """Why this prompt has no answer; its outputs then have the finish_reason "error"."""
    prompt_logprobs: list[dict[int, RankedLogprob] | None] | None = None
    """For each token of the prompt: it and the likeliest, by token id; the first has none."""
    metrics: None = None


# ---- the answer, as far as it is read -------------------------------------------------------------------------------


class _PromptTokensDetails(msgspec.Struct):
    cached_tokens: int = 0


class _UsageRead(msgspec.Struct):
    prompt_tokens_details: _PromptTokensDetails | None = None


class _TopRead(msgspec.Struct):
    token: str
    logprob: float


class _ContentRead(msgspec.Struct):
    token: str
    logprob: float
    top_logprobs: list[_TopRead]


class _LogprobsRead(msgspec.Struct):
    """Of a chat `content`, of a completion the lists."""

    content: list[_ContentRead] | None = None
    tokens: list[str] = []
    token_logprobs: list[float] = []
    top_logprobs: list[dict[str, float]] = []


class _MessageRead(msgspec.Struct):
    content: str | None = None


class _RankedRead(msgspec.Struct):
    logprob: float
    rank: int
    decoded_token: str


class _ChoiceRead(msgspec.Struct):
    index: int
    text: str | None = None
    message: _MessageRead | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    logprobs: _LogprobsRead | None = None
    prompt_logprobs: list[dict[str, _RankedRead] | None] | None = None


class _AnswerRead(msgspec.Struct):
    choices: list[_ChoiceRead]
    usage: _UsageRead | None = None
    prompt_token_ids: list[int] | None = None


class _ErrorRead(msgspec.Struct):
    message: str = ""


class _FailureRead(msgspec.Struct):
    error: _ErrorRead


_read_answer = msgspec.json.Decoder(_AnswerRead).decode
_read_failure = msgspec.json.Decoder(_FailureRead).decode


def request_output(
    request_id: str,
    prompt: str | None,
    body: bytes,
    num_top: int = 0,
    decode: Callable[[int], str] | None = None,
) -> RequestOutput:
    """The output in the body of a complete answer; ValueError where it is none, or lacks token ids.

    `num_top` is how many of the likeliest tokens were asked for, `decode` gives the text of one token.
    """
    try:
        answer = _read_answer(body)
    except DECODE_ERRORS as error:
        raise ValueError(f"not an answer of OpenAI's API: {error}") from None
    choices = sorted(answer.choices, key=lambda choice: choice.index)
    prompt_ids = answer.prompt_token_ids or (choices[0].prompt_token_ids if choices else None)
    if not choices or prompt_ids is None:
        raise ValueError("the answer has no token ids: this server does not know return_token_ids")
    details = answer.usage.prompt_tokens_details if answer.usage else None
    return RequestOutput(
        request_id=request_id,
        prompt=prompt,
        prompt_token_ids=prompt_ids,
        outputs=[_completion_output(choice, num_top, decode) for choice in choices],
        num_cached_tokens=details.cached_tokens if details else 0,
        prompt_logprobs=_prompt_logprobs(choices[0].prompt_logprobs),
    )


def failed_output(request_id: str, prompt: str | None, token_ids: Sequence[int], n: int, error: str) -> RequestOutput:
    """The output of a prompt that has no answer, with as many empty ones as were asked for."""
    outputs = [CompletionOutput(index, "", [], finish_reason="error") for index in range(n)]
    return RequestOutput(request_id, prompt, list(token_ids), outputs, error=error)


def failure_message(status: int, body: bytes) -> str:
    """One line that says why a request failed."""
    try:
        return f"HTTP {status}: {_read_failure(body).error.message}"
    except DECODE_ERRORS:
        return f"HTTP {status}"


def _prompt_logprobs(
    entries: list[dict[str, _RankedRead] | None] | None,
) -> list[dict[int, RankedLogprob] | None] | None:
    if entries is None:
        return None
    return [
        None
        if entry is None
        else {int(token): RankedLogprob(each.logprob, each.rank, each.decoded_token) for token, each in entry.items()}
        for entry in entries
    ]


def _completion_output(choice: _ChoiceRead, num_top: int, decode: Callable[[int], str] | None) -> CompletionOutput:
    if choice.token_ids is None:
        raise ValueError("the answer has no token ids: this server does not know return_token_ids")
    places = _places(choice.logprobs) if choice.logprobs else None
    return CompletionOutput(
        index=choice.index,
        text=(choice.message.content if choice.message else choice.text) or "",
        token_ids=choice.token_ids,
        cumulative_logprob=sum(logprob for _, logprob, _ in places) if places is not None else None,
        logprobs=[_ranked(*place, num_top, decode) for place in places] if places is not None else None,
        finish_reason=choice.finish_reason,
        stop_reason=choice.stop_reason,
    )


def _places(logprobs: _LogprobsRead) -> list[tuple[int, float, dict[int, float]]]:
    """For each drawn token its id, its log probability, and those of the likeliest."""
    if logprobs.content is not None:
        return [
            (_token_id(place.token), place.logprob, {_token_id(top.token): top.logprob for top in place.top_logprobs})
            for place in logprobs.content
        ]
    return [
        (_token_id(token), logprob, {_token_id(name): value for name, value in top.items()})
        for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True)
    ]


def _ranked(
    drawn: int, logprob: float, top: dict[int, float], num_top: int, decode: Callable[[int], str] | None
) -> dict[int, RankedLogprob]:
    """The drawn token first, as in vLLM, then the likeliest in their order.

    `top` may hold the drawn token in addition to the likeliest; its rank is then unknown.
    """
    likeliest = sorted(top, key=lambda token: -top[token])
    ranks = {token: rank for rank, token in enumerate(likeliest[:num_top], 1)}
    values = {drawn: logprob, **{token: top[token] for token in likeliest}}
    return {
        token: RankedLogprob(value, ranks.get(token), decode(token) if decode else None)
        for token, value in values.items()
    }


def _token_id(name: str) -> int:
    if not name.startswith(TOKEN_ID_PREFIX):
        raise ValueError("the log probabilities have no token ids: this server lacks return_tokens_as_token_ids")
    return int(name.removeprefix(TOKEN_ID_PREFIX))
