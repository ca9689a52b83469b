"""Input items of the Responses API: a conversation in, the messages of a chat out.

A chat's messages are what templates are rendered from, so that the same conversation is the same prompt in both APIs.
Knows no other field of a body. Source: the OpenAI API reference (Responses).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from baton.node.errors import BadRequest
from baton.proxy.http.messages import CalledFunction, ChatMessage, Part, ToolCall
from baton.proxy.http.parameters import MAX_NAME_CHARS
from baton.proxy.http.parsing import parse_value
from baton.proxy.http.responses.tools import FREE_TEXT, flat_name

MAX_PARTS = 10_000
_TEXT = "must be a string or an array of text parts; images, audio and files are not supported"
_NOT_KEPT = "answers are not kept here: send their items themselves, as clients do where store is false"
_SHAPES = {"content": _TEXT, "output": _TEXT}

_ItemName = Annotated[str, Field(min_length=1, max_length=4096)]
_Text = str | Annotated[list[Part], Field(max_length=MAX_PARTS, fail_fast=True)]


class _Item(BaseModel):
    """What an answer's item has beside this (`id`, `status`, `phase`) comes back, and no template reads it."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class MessageItem(_Item):
    role: Literal["system", "developer", "user", "assistant"]
    content: _Text


class FunctionCallItem(_Item):
    call_id: _ItemName
    name: _ItemName
    namespace: _ItemName | None = None
    arguments: str


class CustomCallItem(_Item):
    call_id: _ItemName
    name: _ItemName
    namespace: _ItemName | None = None
    input: str


class CallOutputItem(_Item):
    call_id: _ItemName
    output: _Text


class ReasoningPart(_Item):
    text: str


class ReasoningItem(_Item):
    """Reasoning of an earlier answer; what another server has encrypted says nothing here."""

    content: Annotated[list[ReasoningPart], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    summary: Annotated[list[ReasoningPart], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content or ()) or "\n".join(part.text for part in self.summary or ())


InputItem = MessageItem | FunctionCallItem | CustomCallItem | CallOutputItem | ReasoningItem
_ITEMS: Mapping[str, type[InputItem]] = {
    "message": MessageItem,
    "function_call": FunctionCallItem,
    "custom_tool_call": CustomCallItem,
    "function_call_output": CallOutputItem,
    "custom_tool_call_output": CallOutputItem,
    "reasoning": ReasoningItem,
}
_MODELS: tuple[type[BaseModel], ...] = (*_ITEMS.values(), ReasoningPart)
_FIELD_NAMES = frozenset(name for model in _MODELS for name in model.model_fields) | {"type", "text"}


def chat_messages(instructions: str | None, given: str | Sequence[Mapping[str, Any]]) -> list[ChatMessage]:
    """The conversation as a chat has it; raises BadRequest.

    Instructions, and messages of the system or the developer behind them, are one message: many templates allow one,
    at the beginning. Reasoning, texts and calls of an answer are one message too.
    """
    conversation = _Conversation()
    if instructions:
        conversation.take(MessageItem.model_construct(role="system", content=instructions))
    if isinstance(given, str):
        conversation.take(MessageItem.model_construct(role="user", content=given))
    else:
        for index, item in enumerate(given):
            conversation.take(_item(index, item))
    messages = conversation.end()
    if not messages:
        raise BadRequest("input is empty: there must be at least one item", param="input")
    return messages


def _item(index: int, given: Mapping[str, Any]) -> InputItem:
    kind = given.get("type", "message" if "role" in given else None)
    model = _ITEMS.get(kind) if isinstance(kind, str) else None
    if model is None:
        where = f"input.{index}.type"
        what = "is missing" if kind is None else f"{str(kind)[:MAX_NAME_CHARS]!r} is not supported"
        more = _NOT_KEPT if kind == "item_reference" else f"items are {', '.join(_ITEMS)}"
        raise BadRequest(f"{where} {what}: {more}", param=where)
    return parse_value(model, given, ("input", str(index)), _FIELD_NAMES, _SHAPES)


class _Conversation:
    """Joins items to messages."""

    def __init__(self) -> None:
        self._messages: list[ChatMessage] = []
        self._system: list[str] = []
        """At the beginning, before any other item."""
        self._reasoning: list[str] = []
        """Of the answer that is being joined, as its texts and calls."""
        self._texts: list[str] = []
        self._calls: list[ToolCall] = []

    def take(self, item: InputItem) -> None:
        if isinstance(item, MessageItem) and item.role == "assistant":
            if self._texts and not self._calls:  # an answer of its own
                self._end_answer()
            self._texts.append(_text_of(item.content))
        elif isinstance(item, ReasoningItem):
            if self._texts or self._calls:
                self._end_answer()
            self._reasoning += [item.text] if item.text else []
        elif isinstance(item, FunctionCallItem):
            self._call(item.call_id, flat_name(item.namespace, item.name), item.arguments)
        elif isinstance(item, CustomCallItem):
            self._call(item.call_id, flat_name(item.namespace, item.name), {FREE_TEXT: item.input})
        elif isinstance(item, CallOutputItem):
            self._append(role="tool", tool_call_id=item.call_id, content=_text_of(item.output))
        elif item.role == "user" or self._begun:
            self._append(role="user" if item.role == "user" else "system", content=_text_of(item.content))
        else:
            self._system.append(_text_of(item.content))

    def end(self) -> list[ChatMessage]:
        self._end_answer()
        first = [ChatMessage(role="system", content="\n\n".join(self._system))] if self._system else []
        return first + self._messages

    @property
    def _begun(self) -> bool:
        return bool(self._messages or self._reasoning or self._texts or self._calls)

    def _append(self, **fields: Any) -> None:
        self._end_answer()
        self._messages.append(ChatMessage(**fields))

    def _call(self, call_id: str, name: str, arguments: str | dict[str, Any]) -> None:
        function = CalledFunction(name=name, arguments=arguments)
        self._calls.append(ToolCall(id=call_id, function=function))

    def _end_answer(self) -> None:
        if self._reasoning or self._texts or self._calls:
            message = ChatMessage(
                role="assistant",
                content="".join(self._texts),
                tool_calls=self._calls or None,
                reasoning_content="\n".join(self._reasoning) if self._reasoning else None,
            )
            self._messages.append(message)
        self._reasoning, self._texts, self._calls = [], [], []


def _text_of(content: str | Sequence[Part]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)
