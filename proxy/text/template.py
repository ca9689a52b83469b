"""A model's chat template: messages to a prompt's text, by the conventions of Hugging Face's `apply_chat_template`.

Owns the Jinja environment: sandboxed and immutable (a template comes with the model's files, its author is not ours),
with the names that templates rely on (`raise_exception`, `strftime_now`, `tojson`, the `generation` tag, loop
controls). A template is a program: it may loop for ever, also while it is compiled, so the server runs `ChatTemplate`
in a process of its own (`render_process`). Knows no tokens. Source: transformers, utils/chat_template_utils.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from baton.node.errors import BadRequest, SettingsError
from baton.proxy.text.effort import LEVEL

MAX_TEMPLATE_CHARS = 1 << 18
"""Several times the longest template of a known model; parsing takes about a second."""
_DEVELOPER = "developer"
_MARK = "\ue000continued\ue000"
"""Stands for the end of the final message, in a text that is then cut there; private use, so no text has it."""


@dataclass(frozen=True, slots=True)
class RenderOptions:
    """How a conversation becomes a prompt; all values are JSON."""

    add_generation_prompt: bool = True
    """Ask for the assistant's next message."""
    continue_final_message: bool = False
    """Leave the final message open, so that the answer continues it."""
    tools: Sequence[Any] = ()
    in_parts: bool = False
    """Give texts as lists of one part, for templates of models that see images."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Further variables of the template, such as `enable_thinking`."""
    effort: str = ""
    """How much the model shall reason, which becomes variables that are not given; empty: as it does."""
    effort_param: str = LEVEL
    """Where the request says so, for errors."""


NEXT_MESSAGE = RenderOptions()


def check_template(source: str) -> None:
    """Raises SettingsError where `source` is no template. Runs nothing of it, unlike compiling."""
    if len(source) > MAX_TEMPLATE_CHARS:
        raise SettingsError(f"the model's chat template has more than {MAX_TEMPLATE_CHARS} characters")
    try:
        _environment().parse(source)
    except jinja2.TemplateError as error:
        raise SettingsError(f"the model's chat template cannot be read: {error}") from None
    except RecursionError:
        raise SettingsError("the model's chat template cannot be read: it is nested too deeply") from None


def variables_of(source: str) -> frozenset[str]:
    """Names that a template reads before it sets them, if it does; `source` is one. Runs nothing of it."""
    try:
        names = list(_environment().parse(source).find_all(nodes.Name))
    except RecursionError:  # a template that will not compile
        return frozenset()
    first: dict[tuple[str, str], int] = {}
    for name in names:
        key = name.name, name.ctx
        first[key] = min(name.lineno, first.get(key, name.lineno))
    return frozenset(
        name for (name, ctx), line in first.items() if ctx == "load" and line <= first.get((name, "store"), line)
    )


class ChatTemplate:
    """One compiled template; raises SettingsError where its source is no template."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        check_template(source)
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            constants = [node.value for node in environment.parse(source).find_all(nodes.Const)]
        except Exception as error:  # constants are computed here, by filters that fail in any way
            raise SettingsError(f"the model's chat template cannot be compiled: {_reason(error)}") from None
        self._knows_developer = any(isinstance(value, str) and _DEVELOPER in value for value in constants)
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Mapping[str, Any]], options: RenderOptions = NEXT_MESSAGE) -> str:
        """The prompt's text; BadRequest where the template refuses these messages or fails on them."""
        known = [self._known(message) for message in messages]
        final = _mark_final(known) if options.continue_final_message else ""
        if options.in_parts:
            known = [_in_parts(message) for message in known]
        # A template is a program of the model's author: besides raise_exception it fails in any way on what it
        # did not expect, and for the client each of them means that these messages do not fit this model.
        try:
            rendered = self._template.render(
                **{**self._special_tokens, **options.variables},
                messages=known,
                tools=list(options.tools) or None,
                documents=None,
                add_generation_prompt=options.add_generation_prompt,
            )
        except Exception as error:
            raise BadRequest(
                f"the model's chat template does not accept these messages: {_reason(error)}", param="messages"
            ) from None
        return _cut_at_mark(rendered, final) if options.continue_final_message else rendered

    def _known(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """`developer` is OpenAI's newer name of `system`; most templates drop a role that they do not know."""
        if self._knows_developer or message.get("role") != _DEVELOPER:
            return dict(message)
        return {**message, "role": "system"}


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _mark_final(messages: Sequence[dict[str, Any]]) -> str:
    """Mark the end of the final message's text; the text."""
    content = messages[-1].get("content") if messages else None
    if not isinstance(content, str):
        raise BadRequest("continue_final_message needs a final message with text", param="continue_final_message")
    messages[-1]["content"] = content + _MARK + " "
    return content


def _cut_at_mark(rendered: str, final: str) -> str:
    """What comes before the mark. Where the template strips texts (the mark's blank is gone), it is stripped too."""
    end = rendered.rfind(_MARK)
    if end < 0 or final.strip() not in rendered:
        raise BadRequest(
            "the model's chat template does not render the final message as it is, so it cannot be continued",
            param="continue_final_message",
        )
    kept = rendered[:end]
    return kept if rendered[end + len(_MARK) :].startswith(" ") else kept.rstrip()


def _reason(error: Exception) -> str:
    """Some exceptions of Python say nothing, or what only a programmer understands."""
    if isinstance(error, RecursionError):
        return "it recurses too deeply"
    if isinstance(error, MemoryError):
        return "it needs too much memory"
    return str(error)[:1000] or type(error).__name__


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks an assistant's text for training; here its body is rendered."""

    tags = {"generation"}  # noqa: RUF012  # as the base class declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Like Hugging Face's: Jinja's own would escape `<`, `>`, `&` and `'` for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
