"""A chat template in a process of its own, for a template is a program, which may loop or grow for ever.

Knows no tokens.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from baton.node.errors import BadRequest
from baton.proxy.text.bounded_process import CPU_LIMIT_S, BoundedProcess, Handler, Reply, Subject, answer_requests
from baton.proxy.text.template import ChatTemplate, RenderOptions, check_template

MAX_TEXT_CHARS = 32 << 20
SUBJECT = Subject("the model's chat template", "these messages", "messages")


class RenderProcess:
    """Renders one model's chat template; any thread may call it, and waits for those before it.

    Raises SettingsError where a source is no template.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        cpu_limit_s: float = CPU_LIMIT_S,
        *,
        tools_source: str = "",
    ) -> None:
        """`tools_source`: of chats with tools, where they have another template."""
        for each in (source, tools_source):
            check_template(each)
        first = {"source": source, "tools_source": tools_source, "special_tokens": dict(special_tokens)}
        self._process = BoundedProcess(__name__, first, SUBJECT, cpu_limit_s)

    def start(self) -> None:
        """Have the template compiled before it is needed; raises as `render`."""
        self._process.start()

    def render(self, messages: Sequence[Mapping[str, Any]], options: RenderOptions) -> str:
        """As `ChatTemplate.render`; BadRequest also where the template exceeds its limits, or cannot be compiled."""
        # Not dataclasses.asdict, which copies the tools: 12 ms for a hundred of them.
        given = {each.name: getattr(options, each.name) for each in dataclasses.fields(options)}
        request = {"messages": [dict(message) for message in messages], "options": given}
        return str(self._process.ask(request)["text"])

    def close(self) -> None:
        """End the child; `render` would start another one. Does not wait for a conversation that is being rendered."""
        self._process.close()


# ---- the child ------------------------------------------------------------------------------------------------------


def _prepare(first: Mapping[str, Any]) -> Handler:
    template = ChatTemplate(first["source"], first["special_tokens"])
    source = first["tools_source"]
    with_tools = ChatTemplate(source, first["special_tokens"]) if source else template

    def render(request: Mapping[str, Any]) -> Reply:
        options = RenderOptions(**request["options"])
        text = (with_tools if options.tools else template).render(request["messages"], options)
        if len(text) > MAX_TEXT_CHARS:
            raise BadRequest("the model's chat template makes too long a prompt of these messages", param="messages")
        return {"text": text}

    return render


if __name__ == "__main__":
    sys.exit(answer_requests(sys.argv[1:], _prepare))
