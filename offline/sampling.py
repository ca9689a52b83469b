"""How the tokens of an answer are drawn, under vLLM's names, and the fields of a request body that say so.

Checks what can be checked without a model; the server checks the rest. Knows no HTTP.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """The form that an answer has, under vLLM's names: one of the first six. Raises ValueError."""

    json: str | Mapping[str, Any] | bool | None = None
    """A JSON schema, also as text."""
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    """In Lark or GBNF."""
    json_object: bool | None = None
    structural_tag: str | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None
    """What may be between JSON tokens, as a regular expression."""

    def __post_init__(self) -> None:
        kinds = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
        given = [name for name in kinds if getattr(self, name) not in (None, False, "", ())]
        if len(given) != 1:
            raise ValueError(f"one of {', '.join(kinds)} must be given, not {' and '.join(given) or 'none'}")
        if isinstance(self.choice, str):
            raise ValueError("choice must be a list of strings")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the answers to one prompt are sampled. Names, meanings and defaults are vLLM's.

    Every field is sent, so that a model's `generation_config.json` counts only where no SamplingParams is given.
    Raises ValueError.
    """

    n: int = 1
    """Answers to each prompt. The k-th of them, counted from 0, is drawn with seed + k."""
    temperature: float = 1.0
    """0: greedy."""
    top_p: float = 1.0
    """0: the likeliest token alone."""
    top_k: int = 0
    """0 or -1: all tokens."""
    min_p: float = 0.0
    seed: int | None = None
    """None: another one for each prompt."""
    max_tokens: int | None = 16
    """None: as many as the context holds."""
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    """Log probabilities of each drawn token and so many of the likeliest; None: none."""
    prompt_logprobs: int | None = None
    """The same for each token of the prompt but the first. Such a prompt takes no cached prefix."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    """Token id -> what is added to its logit, from -100 to 100."""
    allowed_token_ids: Sequence[int] | None = None
    """Only these are drawn; None: all."""
    bad_words: Sequence[str] | None = None
    """Words that are not generated."""
    skip_special_tokens: bool = True
    """Special tokens are no part of the text."""
    truncate_prompt_tokens: int | None = None
    """So many tokens of the prompt are kept, the last ones; -1: as many as leave room for the answer."""
    structured_outputs: StructuredOutputsParams | None = None
    """None: the answer may have any form."""

    def __post_init__(self) -> None:
        _check_range("n", self.n, 1, 1 << 16)
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_range("top_p", self.top_p, 0.0, 1.0)
        _check_range("top_k", self.top_k, -1, (1 << 31) - 1)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("min_tokens", self.min_tokens, 0, math.inf)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.0, 100.0)
        if self.repetition_penalty == 0:
            raise ValueError("repetition_penalty must be greater than 0")
        if self.max_tokens is not None:
            _check_range("max_tokens", self.max_tokens, max(1, self.min_tokens), math.inf)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ValueError("allowed_token_ids must have a token, or be None")
        if isinstance(self.bad_words, str) or not all(self.bad_words or ()):
            raise ValueError("bad_words must be a list of words that are not empty")
        if self.logprobs is not None:
            _check_range("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            _check_range("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)


def _check_range(name: str, value: float, lowest: float, highest: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not lowest <= value <= highest:
        bounds = f"at least {lowest}" if highest == math.inf else f"from {lowest} to {highest}"
        raise ValueError(f"{name} must be {bounds}, not {value!r}")


def sampling_fields(params: SamplingParams | None, *, chat: bool) -> dict[str, object]:
    """The fields of a request body; those that would be null are left out. None: the defaults of model and server."""
    if params is None:
        return {}
    biases, form = params.logit_bias or {}, params.structured_outputs
    fields: dict[str, object] = {
        **_values(params),
        "stop": [params.stop] if isinstance(params.stop, str) else params.stop,
        "logit_bias": {str(token): bias for token, bias in biases.items()} or None,
        "logprobs": None,
        "prompt_logprobs": params.prompt_logprobs,
        "structured_outputs": None if form is None else _given(_values(form)),
        **_logprob_fields(params.logprobs, chat),
    }
    return {**_given(fields), "skip_special_tokens": params.skip_special_tokens}


def _values(params: SamplingParams | StructuredOutputsParams) -> dict[str, object]:
    return {each.name: getattr(params, each.name) for each in dataclasses.fields(params)}


def _given(fields: Mapping[str, object]) -> dict[str, object]:
    """What is not null, false or an empty list; sequences are lists."""
    plain = {
        name: list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
        for name, value in fields.items()
    }
    return {name: value for name, value in plain.items() if value is not None and value is not False and value != []}


def _logprob_fields(logprobs: int | None, chat: bool) -> dict[str, object]:
    """Token ids instead of texts: two tokens may have one text."""
    if logprobs is None:
        return {}
    kind: dict[str, object] = {"logprobs": True, "top_logprobs": logprobs} if chat else {"logprobs": logprobs}
    return {**kind, "return_tokens_as_token_ids": True}
