"""Conversations of the Messages API: turns of content blocks in, the messages of a chat out.

A chat's messages are what templates are rendered from, so that the same conversation is the same prompt in both APIs.
Knows no other field of a body. Source: the Anthropic API reference (Messages).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TypeVar

from baton.node.errors import BadRequest
from baton.proxy.http.anthropic.blocks import (
    AnyBlock,
    ContentBlock,
    RedactedThinkingBlock,
    SystemPrompt,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    Turn,
)
from baton.proxy.http.messages import CalledFunction, ChatMessage, RefusalPart, TextPart, ToolCall

BILLING = "x-anthropic-billing-header"
"""How a text begins that Claude Code puts before its system prompt. It differs in each request, and no model needs it:
rendered, it would let no prompt begin as the one before."""
_Kind = TypeVar("_Kind", bound=ContentBlock)
_ALLOWED = {
    "user": (TextBlock, ToolResultBlock),
    "assistant": (TextBlock, ThinkingBlock, RedactedThinkingBlock, ToolUseBlock),
    "system": (TextBlock,),
}


def chat_messages(system: SystemPrompt | None, turns: Sequence[Turn]) -> list[ChatMessage]:
    """The conversation as a chat has it; raises BadRequest.

    Neighbouring turns of the user, or of the assistant, are one message, as the API has it. A turn of the system stays
    where it is: what comes before it keeps its place in the prompt, and in caches.
    """
    _check(turns)
    made = list(_system(system)) if system is not None else []
    separate = (message for turn in turns for message in _messages_of(turn))
    for role, neighbours in itertools.groupby(separate, lambda message: message.role):
        together = list(neighbours)
        made += [_join(together)] if role in ("user", "assistant") else together
    if not made:
        raise BadRequest("messages have no text", param="messages")
    return made


def _check(turns: Sequence[Turn]) -> None:
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


def _messages_of(turn: Turn) -> Iterator[ChatMessage]:
    content = turn.content
    if turn.role == "system":
        yield from _system(content if isinstance(content, str) else _only(TextBlock, content))
    elif isinstance(content, str):
        yield ChatMessage.model_construct(role=turn.role, content=content)
    elif turn.role == "assistant":
        yield _answer(content)
    else:
        results, texts = _only(ToolResultBlock, content), _only(TextBlock, content)
        for result in results:
            yield ChatMessage.model_construct(role="tool", tool_call_id=result.tool_use_id, content=result.text)
        if texts or not results:
            yield ChatMessage.model_construct(role="user", content=_parts(texts))


def _answer(blocks: Sequence[AnyBlock]) -> ChatMessage:
    reasoning = [block.thinking for block in _only(ThinkingBlock, blocks)]
    calls = [
        ToolCall.model_construct(
            id=block.id, function=CalledFunction.model_construct(name=block.name, arguments=block.input)
        )
        for block in _only(ToolUseBlock, blocks)
    ]
    return ChatMessage.model_construct(
        role="assistant",
        content=_parts(_only(TextBlock, blocks)),
        tool_calls=calls or None,
        reasoning_content="\n".join(reasoning) if reasoning else None,
    )


def _join(messages: Sequence[ChatMessage]) -> ChatMessage:
    if len(messages) == 1:
        return messages[0]
    reasoning = [each.reasoning_content for each in messages if each.reasoning_content is not None]
    return ChatMessage.model_construct(
        role=messages[0].role,
        content=[part for each in messages for part in _parts_of(each)],
        tool_calls=[call for each in messages for call in each.tool_calls or ()] or None,
        reasoning_content="\n".join(reasoning) if reasoning else None,
    )


def _system(content: SystemPrompt) -> Iterator[ChatMessage]:
    """Nothing where nothing is left of it."""
    texts = [content] if isinstance(content, str) else [block.text for block in content]
    kept = [text for text in map(_without_billing, texts) if text]
    if kept:
        yield ChatMessage.model_construct(role="system", content=[_part(text) for text in kept])


def _without_billing(text: str) -> str:
    return text.partition("\n")[2].lstrip() if text.startswith(BILLING) else text


def _blocks(content: str | Sequence[AnyBlock]) -> Sequence[AnyBlock]:
    return () if isinstance(content, str) else content


def _only(kind: type[_Kind], blocks: Sequence[AnyBlock]) -> list[_Kind]:
    return [block for block in blocks if isinstance(block, kind)]


def _parts_of(message: ChatMessage) -> list[TextPart | RefusalPart]:
    content = message.content or []
    return [_part(content)] if isinstance(content, str) else content


def _parts(blocks: Sequence[TextBlock]) -> list[TextPart | RefusalPart]:
    return [_part(block.text) for block in blocks]


def _part(text: str) -> TextPart:
    return TextPart.model_construct(type="text", text=text)
