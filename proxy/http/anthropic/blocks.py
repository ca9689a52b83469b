"""Content blocks of the Messages API as clients send them. Source: the Anthropic API reference (Messages)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_BLOCKS = 10_000
_ERROR_CHARS = 64
"""Of a failed result, which mostly says in its beginning that it is one."""

_Name = Annotated[str, Field(min_length=1, max_length=4096)]


class ContentBlock(BaseModel):
    """Hints beside the content (`cache_control`, `citations`, `caller`) mean nothing here."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class TextBlock(ContentBlock):
    type: Literal["text"]
    text: str


class ThinkingBlock(ContentBlock):
    """Reasoning of an earlier answer. Its signature is ours, or another server's, and not checked."""

    type: Literal["thinking"]
    thinking: str


class RedactedThinkingBlock(ContentBlock):
    """Reasoning that only Anthropic's own servers can read."""

    type: Literal["redacted_thinking"]


class ToolUseBlock(ContentBlock):
    type: Literal["tool_use"]
    id: _Name
    name: _Name
    input: dict[str, Any]


class ToolReferenceBlock(ContentBlock):
    """A tool that a search for tools has found; all tools are in the prompt already."""

    type: Literal["tool_reference"]
    tool_name: _Name

    @property
    def text(self) -> str:
        return self.tool_name


class ToolResultBlock(ContentBlock):
    type: Literal["tool_result"]
    tool_use_id: _Name
    content: (
        str
        | Annotated[
            list[Annotated[TextBlock | ToolReferenceBlock, Field(discriminator="type")]],
            Field(max_length=MAX_BLOCKS, fail_fast=True),
        ]
        | None
    ) = None
    is_error: bool | None = None

    @property
    def text(self) -> str:
        """What the model reads: templates have no place for `is_error`, so a text that does not say it is given one."""
        content = self.content or ""
        text = content if isinstance(content, str) else "\n".join(block.text for block in content)
        silent = self.is_error and "error" not in text[:_ERROR_CHARS].lower()
        return f"Error: {text}" if silent else text


AnyBlock = TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock
_TaggedBlock = Annotated[AnyBlock, Field(discriminator="type")]
SystemPrompt = str | Annotated[list[TextBlock], Field(max_length=MAX_BLOCKS, fail_fast=True)]


class GivenMessage(BaseModel):
    """One message."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[_TaggedBlock], Field(max_length=MAX_BLOCKS, fail_fast=True)]


BLOCK_MODELS: tuple[type[BaseModel], ...] = (
    *(TextBlock, ThinkingBlock, RedactedThinkingBlock, ToolUseBlock, ToolReferenceBlock, ToolResultBlock, GivenMessage),
)
