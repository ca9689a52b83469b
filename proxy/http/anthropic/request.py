"""Request bodies of the Messages API: bytes in, the same checked `ParsedRequest` as a chat's out.

Parameters are treated as those of OpenAI's API (see `schema`): obeyed and checked strictly, or ignored where they
change no answer, or refused where they ask for what this server does not have; others are reported. Knows no tokenizer.
Source: the Anthropic API reference (Messages, count tokens). `seed`, `priority`, `cache_salt` and
`chat_template_kwargs` are those of chats.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from baton.node.errors import BadRequest
from baton.node.messages.base import MAX_TOKENS
from baton.node.messages.control import MAX_PRIORITY
from baton.proxy.http.anthropic.blocks import BLOCK_MODELS, GivenMessage, SystemPrompt
from baton.proxy.http.anthropic.conversation import chat_messages
from baton.proxy.http.anthropic.encoder import MessagesEncoder
from baton.proxy.http.anthropic.tools import ClientTool, ToolChoice, ToolList, hosted_names, requested_tools
from baton.proxy.http.encoder import EncoderMaker
from baton.proxy.http.parameters import UNSUPPORTED, unknown_parameters
from baton.proxy.http.parsing import parse_body
from baton.proxy.http.schema import (
    MAX_MESSAGES,
    MAX_SALT_CHARS,
    MAX_STOP_STRINGS,
    IdRule,
    ParsedRequest,
    SamplingRequest,
    Stop,
    StopRule,
    Whole,
    session_digest,
)
from baton.proxy.http.structured import json_grammar
from baton.proxy.http.template_options import MAX_VARIABLES, TemplateRequest, render_options
from baton.proxy.text.effort import LEVEL, SWITCHES
from baton.proxy.text.grammar_request import GrammarRequest

MIN_THINKING_TOKENS = 1024
IGNORED = frozenset(
    (
        *("anthropic_beta", "anthropic_version", "betas", "cache_control", "context_management", "diagnostics"),
        *("inference_geo", "metadata", "service_tier", "speed", "user_profile_id", "workspace_id"),
    )
)
"""They change no answer of this server, whatever they say."""
UNSUPPORTED_HERE: Mapping[str, tuple[tuple[object, ...], str]] = {
    **UNSUPPORTED,
    "container": ((), "there is no code execution"),
    "mcp_servers": (([],), "this server calls no tools"),
    "n": ((1,), "a message is one answer"),
    "stop": (("", []), "use stop_sequences"),
    "max_completion_tokens": ((), "use max_tokens"),
    "response_format": ((), "use output_config.format"),
    "reasoning_effort": ((), "use output_config.effort"),
    "logprobs": ((False,), "messages have no log probabilities"),
}
"""As `UNSUPPORTED`."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class ThinkingConfig(_Strict):
    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Whole | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(_Strict):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class MessagesMetadata(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    user_id: Annotated[str, Field(max_length=4096)] | None = None


class CountBody(BaseModel):
    """The fields of both endpoints."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, frozen=True)

    model: Annotated[str, Field(min_length=1, max_length=4096)]
    messages: Annotated[list[GivenMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    system: SystemPrompt | None = None
    tools: ToolList | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    """The older name of output_config.format."""
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=MAX_VARIABLES)] | None = None
    max_tokens: Annotated[Whole, Field(ge=0, le=MAX_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    top_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    top_k: Annotated[Whole, Field(ge=-1, lt=1 << 31)] | None = None
    seed: Annotated[Whole, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop_sequences: Annotated[list[Stop], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)] | None = None
    stream: bool | None = None
    metadata: MessagesMetadata | None = None
    priority: Annotated[Whole, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT_CHARS)] | None = None


class MessagesBody(CountBody):
    max_tokens: Annotated[Whole, Field(ge=0, le=MAX_TOKENS)]


_MODELS: tuple[type[BaseModel], ...] = (
    CountBody,
    ThinkingConfig,
    OutputFormat,
    OutputConfig,
    MessagesMetadata,
    ClientTool,
    ToolChoice,
    *BLOCK_MODELS,
)
_FIELD_NAMES = frozenset(name for model in _MODELS for name in model.model_fields) | {"schema"}
_SHAPES = {
    "content": (
        "must be a string or an array of blocks of text, tool_use, tool_result and thinking; images, documents and "
        "blocks of tools that Anthropic's servers run are not supported"
    ),
    "system": "must be a string or an array of text blocks",
    "stop_sequences": f"must be an array of at most {MAX_STOP_STRINGS} strings",
}


def read_messages(body: bytes) -> tuple[ParsedRequest, EncoderMaker]:
    """The request in the body of /v1/messages, and what writes its answer; raises BadRequest."""
    parsed = _parsed(parse_body(MessagesBody, body, _FIELD_NAMES, _SHAPES))
    return parsed, partial(MessagesEncoder, max_tokens=parsed.max_tokens)


def read_count(body: bytes) -> ParsedRequest:
    """The request in the body of /v1/messages/count_tokens, which needs no max_tokens; raises BadRequest."""
    return _parsed(parse_body(CountBody, body, _FIELD_NAMES, _SHAPES))


def _parsed(body: CountBody) -> ParsedRequest:
    _check_thinking(body)
    hosted = hosted_names(body.tools or ())
    tools = requested_tools(body.tools or (), body.tool_choice)
    messages = chat_messages(body.system, body.messages)
    continues = messages[-1]["role"] == "assistant"
    if continues and "tool_calls" in messages[-1]:
        raise BadRequest("the last message has tool_use blocks: their tool_result blocks must follow", param="messages")
    template = TemplateRequest.model_construct(
        continue_final_message=continues, chat_template_kwargs=_variables(body) | (body.chat_template_kwargs or {})
    )
    user = body.metadata.user_id if body.metadata is not None else None
    return ParsedRequest(
        model=body.model,
        messages=messages,
        render=render_options(template, tools.shown),
        tools=tools,
        sampling=SamplingRequest.model_construct(
            temperature=body.temperature, top_p=body.top_p, top_k=body.top_k, seed=body.seed
        ),
        max_tokens=body.max_tokens,
        ends_with_context=True,
        top_logprobs=None,
        n=1,
        stop=StopRule(tuple(body.stop_sequences or ()), include=False),
        skip_special_tokens=True,
        ids=IdRule(show=False, logprobs_by_id=False),
        stream=bool(body.stream),
        include_usage=False,
        continuous_usage=False,
        truncation=None,
        priority=-(body.priority or 0),
        cache_salt=body.cache_salt or "",
        unknown=_unknown(body) + tuple(f"tools.{name}" for name in hosted),
        grammar=_grammar(body),
        max_reasoning=_max_reasoning(body),
        session_key=session_digest(user or ""),
    )


def _check_thinking(body: CountBody) -> None:
    thinking, where = body.thinking, "thinking.budget_tokens"
    if thinking is None or thinking.type != "enabled":
        return
    if thinking.budget_tokens is None:
        raise BadRequest(f"{where}: Field required", param=where)
    if thinking.budget_tokens < MIN_THINKING_TOKENS:
        raise BadRequest(f"{where} must be at least {MIN_THINKING_TOKENS}", param=where)
    if body.max_tokens is not None and thinking.budget_tokens >= body.max_tokens:
        raise BadRequest(f"{where} must be less than max_tokens", param=where)


def _max_reasoning(body: CountBody) -> int | None:
    """None where the answer has room for one token behind so much reasoning: agents send that for no bound."""
    budget = body.thinking.budget_tokens if body.thinking is not None and body.thinking.type == "enabled" else None
    return None if budget is None or body.max_tokens is None or budget + 1 >= body.max_tokens else budget


def _variables(body: CountBody) -> dict[str, Any]:
    """Of the template, which may know none of them: the effort is a hint, and agents send it to every model."""
    made: dict[str, Any] = {}
    if body.thinking is not None:
        made |= dict.fromkeys(SWITCHES, body.thinking.type != "disabled")
    effort = body.output_config.effort if body.output_config is not None else None
    if effort is not None:
        made[LEVEL] = "high" if effort in ("xhigh", "max") else effort
    return made


def _grammar(body: CountBody) -> GrammarRequest | None:
    asked = body.output_config.format if body.output_config is not None else None
    if asked is not None:
        return json_grammar(asked.schema_, "output_config.format.schema")
    return json_grammar(body.output_format.schema_, "output_format.schema") if body.output_format is not None else None


def _unknown(body: CountBody) -> tuple[str, ...]:
    extra = {name: value for name, value in (body.model_extra or {}).items() if name not in IGNORED}
    return unknown_parameters(extra, type(body).model_fields, UNSUPPORTED_HERE)
