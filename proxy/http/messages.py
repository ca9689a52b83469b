"""Messages of a conversation as clients send them, and the fields of them that chat templates read.

Knows no request body beside them. Source: the OpenAI API reference (chat).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from baton.node.errors import BadRequest


class TextPart(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message of a conversation. A client may send back an answer's message with its extra fields."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: Annotated[str, Field(max_length=4096)] | None = None
    tool_call_id: Annotated[str, Field(max_length=4096)] | None = None


def message_fields(index: int, message: ChatMessage) -> Mapping[str, str]:
    """The fields that templates read; parts of text are joined by a line break, as vLLM does."""
    _check_message(index, message)
    content = message.content
    text = "\n".join(part.text for part in content) if isinstance(content, list) else content or ""
    fields = {"role": message.role, "content": text, "name": message.name, "tool_call_id": message.tool_call_id}
    return {name: value for name, value in fields.items() if value is not None}


def _check_message(index: int, message: ChatMessage) -> None:
    where = f"messages.{index}"
    if message.content is None and message.role != "assistant":
        raise BadRequest(f"{where}.content is missing", param=f"{where}.content")
    for name, value in (message.model_extra or {}).items():
        if value is not None and value != [] and name not in ("refusal", "annotations"):
            raise BadRequest(f"{where}.{name[:64]} is not supported", param=f"{where}.{name[:64]}")
