"""Request bodies of the Responses API: bytes in, the same checked `ParsedRequest` as a chat's out.

Parameters are treated as those of chats (see `schema`), and vLLM's extra ones are the same. The server keeps no
answers: what asks for a kept one is refused, `store` is answered by false. Knows no tokenizer.
Source: the OpenAI API reference (Responses).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from baton.node.errors import BadRequest
from baton.node.messages.base import MAX_TOKENS
from baton.node.messages.control import MAX_PRIORITY
from baton.proxy.http.encoder import EncoderMaker
from baton.proxy.http.messages import conversation
from baton.proxy.http.parameters import UNSUPPORTED, check_unsupported, unknown_parameters
from baton.proxy.http.parsing import parse_body
from baton.proxy.http.responses.encoder import ResponsesEncoder
from baton.proxy.http.responses.items import chat_messages
from baton.proxy.http.responses.shapes import RepeatedFields
from baton.proxy.http.responses.tools import GivenTools
from baton.proxy.http.schema import (
    MAX_MESSAGES,
    MAX_SALT_CHARS,
    MAX_STOP_STRINGS,
    STOP_SHAPE,
    IdRule,
    Key,
    ParsedRequest,
    SamplingRequest,
    Stop,
    StopRule,
    StreamOptions,
    Truncation,
    Whole,
    check_beside_grammar,
    session_digest,
)
from baton.proxy.http.structured import StructuredFields, StructuredOutputs, grammar_request, json_grammar
from baton.proxy.http.template_options import Effort, TemplateRequest, render_options
from baton.proxy.http.tools import MAX_TOOLS, MAX_TOOLS_CHARS, ToolFields, tool_request
from baton.proxy.text.grammar_request import GrammarRequest

MAX_METADATA, MAX_METADATA_CHARS = 16, 512
MAX_DESCRIPTION_CHARS = 1 << 16
MAX_REPEATED_CHARS = 2 * MAX_TOOLS_CHARS
"""Of tools and tool_choice, which an answer repeats and holds until its end."""
MAX_INCLUDED = 32
LOGPROBS, ENCRYPTED = "message.output_text.logprobs", "reasoning.encrypted_content"
"""Values of `include` that are known here. Reasoning is not encrypted: items have it as text."""
_KEEPS_NOTHING = "answers are not kept here"
UNSUPPORTED_HERE: Mapping[str, tuple[tuple[object, ...], str]] = {
    **UNSUPPORTED,
    "background": ((False,), f"{_KEEPS_NOTHING}, so none can be made in the background"),
    "conversation": ((), f"{_KEEPS_NOTHING}: send the items of the conversation as input"),
    "prompt": ((), "there are no stored prompts: use instructions and input"),
    "context_management": (([],), "conversations are not made shorter"),
    "n": ((1,), "a response is one answer"),
    "messages": ((), "use input"),
    "max_tokens": ((), "use max_output_tokens"),
    "max_completion_tokens": ((), "use max_output_tokens"),
    "response_format": ((), "use text.format"),
    "reasoning_effort": ((), "use reasoning.effort"),
    "include_reasoning": ((True,), "reasoning has items of its own"),
    "logprobs": ((False,), f"use top_logprobs, and {LOGPROBS} in include"),
    "return_token_ids": ((False,), "items have no token ids"),
    "return_tokens_as_token_ids": ((False,), "items have no token ids"),
}
"""As `UNSUPPORTED`."""


MetadataText = Annotated[str, Field(max_length=MAX_METADATA_CHARS)]


class TextFormat(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] | None = None
    description: Annotated[str, Field(max_length=MAX_DESCRIPTION_CHARS)] | None = None
    schema_: Annotated[dict[str, Any] | bool | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextFields(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningFields(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    """Accepted: items have all of the reasoning, and no summary."""


class ResponsesRequest(SamplingRequest, TemplateRequest):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, frozen=True)

    model: Annotated[str, Field(min_length=1, max_length=4096)]
    input: str | Annotated[list[dict[str, Any]], Field(max_length=MAX_MESSAGES, fail_fast=True)]
    instructions: str | None = None
    max_output_tokens: Annotated[Whole, Field(ge=1, le=MAX_TOKENS)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextFields | None = None
    structured_outputs: StructuredOutputs | None = None
    reasoning: ReasoningFields | None = None
    include: Annotated[list[str], Field(max_length=MAX_INCLUDED)] | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    metadata: Annotated[dict[MetadataText, MetadataText], Field(max_length=MAX_METADATA)] | None = None
    user: Key | None = None
    safety_identifier: Key | None = None
    prompt_cache_key: Key | None = None
    session_id: Key | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    priority: Annotated[Whole, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT_CHARS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


_MODELS: tuple[type[BaseModel], ...] = (TextFormat, TextFields, ReasoningFields, StructuredOutputs, StreamOptions)
_FIELD_NAMES = frozenset(field.alias or name for model in _MODELS for name, field in model.model_fields.items())
_SHAPES = {
    "input": f"must be a string or an array of at most {MAX_MESSAGES} items, each an object",
    "tool_choice": "must be none, auto, required or an object",
    "stop": STOP_SHAPE,
}


def read_responses(body: bytes) -> tuple[ParsedRequest, EncoderMaker]:
    """The request in the body of /v1/responses, and what writes its answer; raises BadRequest."""
    request = parse_body(ResponsesRequest, body, _FIELD_NAMES, _SHAPES)
    unknown = unknown_parameters(request.model_extra or {}, type(request).model_fields, UNSUPPORTED_HERE)
    _check(request)
    given = GivenTools(request.tools or ())
    parsed = _parsed(request, given, unknown)
    return parsed, partial(ResponsesEncoder, _repeated(request, given), given.called)


def _check(request: ResponsesRequest) -> None:
    if request.previous_response_id is not None:
        what = f"{_KEEPS_NOTHING}: send the items of the conversation as input"
        raise BadRequest(
            f"previous_response_id is not supported: {what}",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    if request.prompt_logprobs is not None:
        raise BadRequest("prompt_logprobs is not supported: items have none", param="prompt_logprobs")
    for place, value in enumerate(request.include or ()):
        if value not in (LOGPROBS, ENCRYPTED):
            param = f"include.{place}"
            raise BadRequest(f"{param} is not supported: must be {LOGPROBS} or {ENCRYPTED}", param=param)
    if request.text is not None and request.text.verbosity is not None:
        check_unsupported("text.verbosity", request.text.verbosity, *UNSUPPORTED["verbosity"])
    if request.max_output_tokens is not None and (request.min_tokens or 0) > request.max_output_tokens:
        raise BadRequest("min_tokens is greater than max_output_tokens", param="min_tokens")


def _parsed(request: ResponsesRequest, given: GivenTools, unknown: tuple[str, ...]) -> ParsedRequest:
    fields = ToolFields.model_construct(
        tools=given.declared,
        tool_choice=given.choice(request.tool_choice),
        parallel_tool_calls=request.parallel_tool_calls,
    )
    tools = replace(tool_request(fields), params=given.params)
    effort = request.reasoning.effort if request.reasoning is not None else None
    template = TemplateRequest.model_construct(
        **{name: getattr(request, name) for name in TemplateRequest.model_fields}
    )
    return ParsedRequest(
        model=request.model,
        messages=conversation(chat_messages(request.instructions, request.input)),
        prompt_param="input",
        render=render_options(template, tools.shown, effort, "reasoning.effort"),
        tools=tools,
        sampling=SamplingRequest.model_construct(
            **{name: getattr(request, name) for name in SamplingRequest.model_fields}
        ),
        max_tokens=request.max_output_tokens,
        top_logprobs=(request.top_logprobs or 0) if LOGPROBS in (request.include or ()) else None,
        n=1,
        stop=StopRule(
            (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ()),
            bool(request.include_stop_str_in_output),
        ),
        skip_special_tokens=request.skip_special_tokens is not False,
        ids=IdRule(show=False, logprobs_by_id=False),
        stream=bool(request.stream),
        include_usage=False,
        continuous_usage=False,
        truncation=Truncation(None, keep_first=False) if request.truncation == "auto" else None,
        priority=-(request.priority or 0),
        cache_salt=request.cache_salt or "",
        unknown=unknown + tuple(f"tools.{kind}" for kind in given.ignored),
        grammar=_grammar(request),
        session_key=session_digest(request.prompt_cache_key or request.session_id or request.user or ""),
    )


def _grammar(request: ResponsesRequest) -> GrammarRequest | None:
    """The form that the answer must have; raises BadRequest."""
    found = _text_grammar(request.text.format if request.text is not None else None)
    other = grammar_request(StructuredFields.model_construct(structured_outputs=request.structured_outputs))
    if found is not None and other is not None:
        raise BadRequest(f"{other.param} contradicts {found.param}: an answer has one form", param=other.param)
    if found is not None or other is not None:
        check_beside_grammar(request)
    return found or other


def _text_grammar(form: TextFormat | None) -> GrammarRequest | None:
    param = "text.format.schema"
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return json_grammar({"type": "object"}, "text.format")
    if form.schema_ is None:
        raise BadRequest(f"{param} is missing", param=param)
    return json_grammar(form.schema_, param, lenient=form.strict is False)


def _repeated(request: ResponsesRequest, given: GivenTools) -> RepeatedFields:
    form = request.text.format if request.text is not None else None
    shown = {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)
    reasoning = request.reasoning or ReasoningFields()
    if len(json.dumps((given.shown, request.tool_choice))) > MAX_REPEATED_CHARS:
        raise BadRequest(f"tools and tool_choice have more than {MAX_REPEATED_CHARS} characters", param="tools")
    return RepeatedFields(
        instructions=request.instructions,
        max_output_tokens=request.max_output_tokens,
        metadata=request.metadata or {},
        parallel_tool_calls=request.parallel_tool_calls is not False,
        prompt_cache_key=request.prompt_cache_key,
        reasoning={"effort": reasoning.effort, "summary": reasoning.summary},
        safety_identifier=request.safety_identifier,
        text={"format": shown, "verbosity": "medium"},
        tool_choice=request.tool_choice or "auto",
        tools=given.shown,
        top_logprobs=request.top_logprobs or 0,
        truncation=request.truncation or "disabled",
        user=request.user,
    )
