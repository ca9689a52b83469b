"""Conversations of the Messages API: turns of content blocks in, the messages of a chat out.

A chat's messages are what templates are rendered from, so that the same conversation is the same prompt in both APIs.
Knows no other field of a body. Source: the Anthropic API reference (Messages).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from baton.node.errors import BadRequest
from baton.proxy.http.anthropic.blocks import (
    AnyBlock,
    ContentBlock,
    GivenMessage,
    RedactedThinkingBlock,
    SystemPrompt,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from baton.proxy.http.messages import call_fields, reasoning_fields

BILLING = "x-anthropic-billing-header"
"""How a text begins that Claude Code puts before its system prompt. It differs in each request, and no model needs it:
rendered, it would let no prompt begin as the one before."""
_Kind = TypeVar("_Kind", bound=ContentBlock)
_ALLOWED = {
    "user": (TextBlock, ToolResultBlock),
    "assistant": (TextBlock, ThinkingBlock, RedactedThinkingBlock, ToolUseBlock),
    "system": (TextBlock,),
}


@dataclass(slots=True)
class _Message:
    """One message of a chat, while turns are added to it."""

    role: str
    texts: list[str]
    calls: list[Mapping[str, object]] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    result_of: str = ""
    """The call that it is the result of."""

    def add(self, other: _Message) -> None:
        self.texts += other.texts
        self.calls += other.calls
        self.reasoning += other.reasoning

    def fields(self) -> Mapping[str, object]:
        """As of a chat's message: templates read both."""
        made: dict[str, object] = {"role": self.role, "content": "\n".join(self.texts)}
        if self.result_of:
            made["tool_call_id"] = self.result_of
        if self.calls:
            made["tool_calls"] = self.calls
        if self.reasoning:
            made |= reasoning_fields("\n".join(self.reasoning))
        return made


def chat_messages(system: SystemPrompt | None, turns: Sequence[GivenMessage]) -> tuple[Mapping[str, object], ...]:
    """The conversation as a chat has it; raises BadRequest.

    Neighbouring turns of the user, or of the assistant, are one message, as the API has it. A turn of the system stays
    where it is: what comes before it keeps its place in the prompt, and in caches.
    """
    _check(turns)
    made = list(_system(system)) if system is not None else []
    for turn in turns:
        for message in _messages_of(turn):
            if made and made[-1].role == message.role and message.role in ("user", "assistant"):
                made[-1].add(message)
            else:
                made.append(message)
    if not made:
        raise BadRequest("messages have no text", param="messages")
    return tuple(message.fields() for message in made)


def _check(turns: Sequence[GivenMessage]) -> None:
    called: set[str] = set()
    for index, turn in enumerate(turns):
        for place, block in enumerate(_blocks(turn.content)):
            where = f"messages.{index}.content.{place}"
            if not isinstance(block, _ALLOWED[turn.role]):
                raise BadRequest(f"{where}: a message of the {turn.role} cannot have {block.type} blocks", param=where)
            if isinstance(block, ToolUseBlock):
                called.add(block.id)
            if isinstance(block, ToolResultBlock) and block.tool_use_id not in called:
                raise BadRequest(f"{where}: no tool_use block before it has the id of its tool_use_id", param=where)


def _messages_of(turn: GivenMessage) -> Iterator[_Message]:
    content = turn.content
    if turn.role == "system":
        yield from _system(content if isinstance(content, str) else _only(TextBlock, content))
    elif isinstance(content, str):
        yield _Message(turn.role, [content])
    elif turn.role == "assistant":
        yield _answer(content)
    else:
        results, texts = _only(ToolResultBlock, content), _only(TextBlock, content)
        for result in results:
            yield _Message("tool", [result.text], result_of=result.tool_use_id)
        if texts or not results:
            yield _Message("user", [block.text for block in texts])


def _answer(blocks: Sequence[AnyBlock]) -> _Message:
    return _Message(
        "assistant",
        [block.text for block in _only(TextBlock, blocks)],
        [call_fields(block.id, block.name, block.input) for block in _only(ToolUseBlock, blocks)],
        [block.thinking for block in _only(ThinkingBlock, blocks)],
    )


def _system(content: SystemPrompt) -> Iterator[_Message]:
    """Nothing where nothing is left of it."""
    texts = [content] if isinstance(content, str) else [block.text for block in content]
    kept = [text for text in map(_without_billing, texts) if text]
    if kept:
        yield _Message("system", kept)


def _without_billing(text: str) -> str:
    return text.partition("\n")[2].lstrip() if text.startswith(BILLING) else text


def _blocks(content: str | Sequence[AnyBlock]) -> Sequence[AnyBlock]:
    return () if isinstance(content, str) else content


def _only(kind: type[_Kind], blocks: Sequence[AnyBlock]) -> list[_Kind]:
    return [block for block in blocks if isinstance(block, kind)]
