"""The JSON of a request: a turn behind the earlier turns of its conversation, for one of OpenAI's two endpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import msgspec

from baton.benchmark.load.plan import PartsPrompt, Turn
from baton.benchmark.load.prompts import PartSource
from baton.node.errors import SettingsError

Content = str | list[int] | Sequence[Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class PastTurn:
    """An earlier turn of a conversation."""

    user: str
    answer: str


@dataclass(frozen=True, slots=True)
class BodyStyle:
    """What all requests of a run have in common."""

    model: str
    chat: bool
    as_ids: bool
    """Random prompts are sent as token ids; else as text."""
    temperature: float
    ignore_eos: bool
    include_usage: bool
    extra: Mapping[str, object]
    """More fields, which overrule the others."""

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"


class BodyWriter:
    """Makes the bodies of one run's requests."""

    def __init__(self, style: BodyStyle, parts: PartSource) -> None:
        self._style = style
        self._parts = parts

    def check(self, turn: Turn, in_conversation: bool) -> None:
        """Raises SettingsError where the endpoint has no shape for such a prompt."""
        content = self._content(turn) if not isinstance(turn.prompt, PartsPrompt) else ""
        if not isinstance(content, str) and (in_conversation or self._style.chat != isinstance(content[0], Mapping)):
            kind = "messages" if isinstance(content[0], Mapping) else "token ids"
            where = "in a conversation" if in_conversation else f"to {self._style.path}"
            raise SettingsError(f"prompts that are {kind} cannot be sent {where}")

    def user_text(self, turn: Turn) -> str:
        """The user's text in this turn of a conversation."""
        content = self._content(turn)
        assert isinstance(content, str), "conversations are text: `check` refuses others"
        return content

    def body(self, turn: Turn, before: Sequence[PastTurn]) -> bytes:
        style = self._style
        content = self._content(turn)
        fields: dict[str, object] = {"model": style.model, "max_tokens": turn.max_tokens, "stream": True}
        if style.chat:
            fields["messages"] = self._messages(content, before)
        else:
            fields["prompt"] = self._joined(content, before) if before else content
        fields["temperature"] = style.temperature
        if style.include_usage:
            fields["stream_options"] = {"include_usage": True}
        if style.ignore_eos:
            fields["ignore_eos"] = True
        return msgspec.json.encode({**fields, **style.extra})

    def _content(self, turn: Turn) -> Content:
        prompt = turn.prompt
        if not isinstance(prompt, PartsPrompt):
            given = prompt.content
            return given if isinstance(given, str) else cast(Content, list(given))
        if self._style.as_ids:
            return [token_id for part in prompt.parts for token_id in self._parts.ids(part)]
        return "".join(self._parts.text(part) for part in prompt.parts)

    @staticmethod
    def _joined(content: Content, before: Sequence[PastTurn]) -> str:
        assert isinstance(content, str), "conversations are text: `check` refuses others"
        return "".join(past.user + past.answer for past in before) + content

    @staticmethod
    def _messages(content: Content, before: Sequence[PastTurn]) -> list[Mapping[str, str]]:
        if not isinstance(content, str):
            return list(content)  # type: ignore[arg-type]  # messages: `check` refuses others
        history: list[Mapping[str, str]] = []
        for past in before:
            history += [{"role": "user", "content": past.user}, {"role": "assistant", "content": past.answer}]
        return [*history, {"role": "user", "content": content}]
