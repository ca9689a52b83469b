"""One model's chat template: its process, the conversations that wait for it, and what a trial says of the template.

The trial renders short conversations before any other: with a tool, and with the switches of reasoning; and with texts
as lists of parts, where the template leaves out a plain one. Like all others it is bounded. Knows no tokens.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from baton.node.errors import BadRequest, BatonError, Overloaded
from baton.node.telemetry import log_event
from baton.proxy.text.effort import SWITCHES
from baton.proxy.text.render_process import RenderProcess
from baton.proxy.text.template import NEXT_MESSAGE, RenderOptions, variables_of

logger = logging.getLogger(__name__)

WAIT_S = 10.0
"""For the conversations before one to be rendered; each takes about a millisecond unless a template misbehaves."""
_TEXT = "Hi, how are you?"
_QUESTION = ({"role": "user", "content": _TEXT},)
_TOOL = {
    "type": "function",
    "function": {"name": "look_up", "description": "Look up.", "parameters": {"type": "object", "properties": {}}},
}


@dataclass(frozen=True, slots=True)
class TemplateTrial:
    """What a template made of one question; empty texts where it failed."""

    plain: str = ""
    with_tool: str = ""
    with_reasoning: str = ""
    """Switched on."""
    in_parts: bool = False
    """It takes texts as lists of parts only."""

    @property
    def ignores_tools(self) -> bool:
        return bool(self.plain) and self.plain == self.with_tool


class Renderer:
    """Renders the conversations of one model; raises SettingsError where a source is no template."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], tools_source: str = "") -> None:
        """`tools_source`: of chats with tools, where they have another template."""
        self.trial: TemplateTrial | None = None
        """None until a conversation has been rendered."""
        self._process = RenderProcess(source, special_tokens, tools_source=tools_source)
        self.variables = variables_of(source) | variables_of(tools_source)
        """That the template knows."""
        self._thread = ThreadPoolExecutor(1, "render")

    def start(self) -> None:
        """Prepare the template in the background; a folder with a bad one still serves completions."""
        self._thread.submit(self._start)

    def render(self, messages: Sequence[Mapping[str, Any]], options: RenderOptions = NEXT_MESSAGE) -> str:
        """The prompt of a chat; BadRequest where the template does not accept it."""
        if self.trial is None:
            self.trial = self._try()
        return self._process.render(messages, replace(options, in_parts=self.trial.in_parts))

    async def render_bounded(self, messages: Sequence[Mapping[str, Any]], options: RenderOptions) -> str:
        """As `render`, off the event loop; Overloaded where the conversations before it take too long."""
        try:
            async with asyncio.timeout(WAIT_S):
                return await asyncio.get_running_loop().run_in_executor(self._thread, self.render, messages, options)
        except TimeoutError:
            raise Overloaded("the model's chat template takes too long for the conversations sent") from None

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._process.close()

    def _start(self) -> None:
        try:
            self._process.start()
        except BatonError as error:
            log_event(logger, "chat_template_failed", level=logging.WARNING, reason=str(error))
            return
        self.trial = self.trial or self._try()

    def _try(self) -> TemplateTrial:
        options, plain = NEXT_MESSAGE, self._tried(NEXT_MESSAGE)
        if _TEXT not in plain:
            in_parts = replace(NEXT_MESSAGE, in_parts=True)
            if _TEXT in (found := self._tried(in_parts)):
                options, plain = in_parts, found
        if not plain:  # it refuses short conversations, or fails on all of them
            return TemplateTrial()
        with_tool = self._tried(replace(options, tools=(_TOOL,)))
        switched = self._tried(replace(options, variables=dict.fromkeys(SWITCHES, True)))
        return TemplateTrial(plain, with_tool, switched, options.in_parts)

    def _tried(self, options: RenderOptions) -> str:
        try:
            return self._process.render(_QUESTION, options)
        except BadRequest:
            return ""
