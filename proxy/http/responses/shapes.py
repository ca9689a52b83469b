"""The objects of the Responses API's answers, named as in the API. Encoded by msgspec.

Source: the OpenAI API reference (Responses).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from baton.proxy.http.events import TokenUsage
from baton.proxy.http.logprobs import ChatLogprob


class OutputTextPart(msgspec.Struct, kw_only=True):
    type: str = "output_text"
    text: str = ""
    annotations: Sequence[Any] = ()
    logprobs: Sequence[ChatLogprob] = ()


class ReasoningTextPart(msgspec.Struct, kw_only=True):
    type: str = "reasoning_text"
    text: str = ""


class MessageOutput(msgspec.Struct, kw_only=True):
    type: str = "message"
    id: str
    role: str = "assistant"
    status: str
    content: Sequence[OutputTextPart] = ()


class ReasoningOutput(msgspec.Struct, kw_only=True):
    type: str = "reasoning"
    id: str
    status: str
    summary: Sequence[Any] = ()
    content: Sequence[ReasoningTextPart] = ()


class FunctionCallOutput(msgspec.Struct, kw_only=True):
    type: str = "function_call"
    id: str
    status: str
    call_id: str
    name: str
    namespace: str | msgspec.UnsetType = msgspec.UNSET
    arguments: str = ""


class CustomCallOutput(msgspec.Struct, kw_only=True):
    type: str = "custom_tool_call"
    id: str
    status: str
    call_id: str
    name: str
    namespace: str | msgspec.UnsetType = msgspec.UNSET
    input: str = ""


OutputItem = MessageOutput | ReasoningOutput | FunctionCallOutput | CustomCallOutput


class _InputDetails(msgspec.Struct):
    cached_tokens: int
    cache_write_tokens: int = 0


class _OutputDetails(msgspec.Struct):
    reasoning_tokens: int


class ResponseUsage(msgspec.Struct):
    input_tokens: int
    input_tokens_details: _InputDetails
    output_tokens: int
    output_tokens_details: _OutputDetails
    total_tokens: int


class ResponseError(msgspec.Struct):
    code: str
    message: str


class IncompleteDetails(msgspec.Struct):
    reason: str = "max_output_tokens"


class RepeatedFields(msgspec.Struct, frozen=True, kw_only=True):
    """What the answer repeats of the request."""

    instructions: str | None
    max_output_tokens: int | None
    metadata: Mapping[str, str]
    parallel_tool_calls: bool
    prompt_cache_key: str | None
    reasoning: Mapping[str, Any]
    safety_identifier: str | None
    text: Mapping[str, Any]
    tool_choice: str | Mapping[str, Any]
    tools: Sequence[Mapping[str, Any]]
    top_logprobs: int
    truncation: str
    user: str | None


class ResponseState(msgspec.Struct, kw_only=True):
    """A response without the repeated fields."""

    id: str
    object: str = "response"
    created_at: int
    status: str
    background: bool = False
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    max_tool_calls: None = None
    model: str
    output: Sequence[OutputItem]
    previous_response_id: None = None
    service_tier: str = "default"
    store: bool = False
    temperature: float
    top_p: float
    usage: ResponseUsage | None = None


def response_usage(usage: TokenUsage) -> ResponseUsage:
    return ResponseUsage(
        usage.prompt_tokens,
        _InputDetails(usage.cached_tokens),
        usage.completion_tokens,
        _OutputDetails(usage.reasoning_tokens),
        usage.prompt_tokens + usage.completion_tokens,
    )
