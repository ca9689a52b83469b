"""Messages of a conversation as clients send them, and the fields of them that chat templates read.

Tool calls and reasoning of earlier turns go to the template, which decides what becomes of them. Knows no request body
beside the messages. Sources: the OpenAI API reference (chat), vLLM (arguments as objects, both names of reasoning).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from baton.node.errors import BadRequest
from baton.proxy.http.json_bounds import check_structure
from baton.proxy.http.parameters import MAX_NAME_CHARS, check_spelling

MAX_TOOL_CALLS = 1024
_ANSWER_FIELDS = frozenset(("refusal", "annotations", "id", "type", "status", "object"))
"""What answers have beside their text, and clients send back: no template reads it."""
_LOST = frozenset(("audio", "function_call", "image", "images", "videos"))
"""Content that would be lost in silence."""

_Name = Annotated[str, Field(max_length=4096)]


class TextPart(BaseModel):
    """A part of a message. Hints beside the text (`cache_control`) mean nothing here."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    type: Literal["text", "input_text", "output_text"]
    text: str


class RefusalPart(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


Part = Annotated[TextPart | RefusalPart, Field(discriminator="type")]
"""Without the discriminator pydantic tries both for each of a conversation's parts."""


class CalledFunction(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    name: _Name
    arguments: str | dict[str, Any] | None = None


class ToolCall(BaseModel):
    """A call that the model made in an earlier turn."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    id: _Name | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(BaseModel):
    """One message of a conversation. A client may send back an answer's message with its extra fields."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    name: _Name | None = None
    tool_call_id: _Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOL_CALLS, fail_fast=True)] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


def conversation(messages: Sequence[ChatMessage]) -> tuple[Mapping[str, object], ...]:
    """Of each message the fields that templates read; raises BadRequest."""
    calls = [call for message in messages for call in message.tool_calls or ()]
    written = [call.function.arguments for call in calls if isinstance(call.function.arguments, str)]
    check_structure(*(arguments.encode(errors="surrogatepass") for arguments in written))
    return tuple(message_fields(index, message) for index, message in enumerate(messages))


def message_fields(index: int, message: ChatMessage) -> Mapping[str, object]:
    """The fields that templates read; parts of text are joined by a line break, as vLLM does."""
    _check_content(index, message)
    content = message.content
    text = "\n".join(part.text for part in content) if isinstance(content, list) else content or ""
    fields: dict[str, object] = {"role": message.role, "content": text}
    fields |= {name: value for name in ("name", "tool_call_id") if (value := getattr(message, name)) is not None}
    if message.role == "assistant":
        fields |= _answer_fields(index, message)
    return fields


def _check_content(index: int, message: ChatMessage) -> None:
    if message.content is None and message.role != "assistant":
        where = f"messages.{index}.content"
        raise BadRequest(f"{where} is missing", param=where)
    for name, value in (message.model_extra or {}).items():
        if name in _LOST and value is not None and value != []:
            where = f"messages.{index}.{name}"
            raise BadRequest(f"{where} is not supported: messages are text and tool calls", param=where)


def unknown_in_messages(messages: Sequence[ChatMessage], limit: int) -> list[str]:
    """The first `limit` names of fields that mean nothing here, each once; BadRequest for a misspelt one."""
    found: dict[str, str] = {}
    for index, message in enumerate(messages):
        for name, value in (message.model_extra or {}).items():
            if value is None or value == [] or name in found or name in _ANSWER_FIELDS or name in _LOST:
                continue
            if len(found) >= limit:
                return list(found.values())
            check_spelling(name, ChatMessage.model_fields, parent=f"messages.{index}")
            found[name] = f"messages.{name[:MAX_NAME_CHARS]}"
    return list(found.values())


def _answer_fields(index: int, message: ChatMessage) -> dict[str, object]:
    """What an earlier answer had beside its text."""
    fields: dict[str, object] = {}
    if message.tool_calls:
        where = f"messages.{index}.tool_calls"
        fields["tool_calls"] = [
            _call_fields(call, f"{where}.{place}.function.arguments") for place, call in enumerate(message.tool_calls)
        ]
    reasoning = message.reasoning if message.reasoning is not None else message.reasoning_content
    if reasoning is not None:
        fields |= reasoning_fields(reasoning)
    return fields


def _call_fields(call: ToolCall, where: str) -> dict[str, object]:
    """Templates expect the arguments as an object; `where` they are, for errors."""
    arguments = call.function.arguments
    if isinstance(arguments, str):
        arguments = _json_object(arguments, where) if arguments.strip() else {}
    return call_fields(call.id, call.function.name, arguments or {})


def call_fields(call_id: str | None, name: str, arguments: Mapping[str, Any]) -> dict[str, object]:
    """Of a call in an earlier answer, for templates."""
    function = {"name": name, "arguments": arguments}
    return {**({"id": call_id} if call_id is not None else {}), "type": "function", "function": function}


def reasoning_fields(text: str) -> dict[str, object]:
    """Of an earlier answer, under both names that templates know."""
    return {"reasoning": text, "reasoning_content": text}


def _json_object(text: str, where: str) -> dict[str, Any]:
    """Raises BadRequest."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise BadRequest(f"{where} is not a JSON object", param=where)
    return value
