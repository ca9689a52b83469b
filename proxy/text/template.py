"""A model's chat template: messages to a prompt's text, by the conventions of Hugging Face's `apply_chat_template`.

Owns the Jinja environment: sandboxed and immutable (a template comes with the model's files, its author is not ours),
with the names that templates rely on (`raise_exception`, `strftime_now`, `tojson`, the `generation` tag, loop
controls). Knows no tokens. Source: transformers, utils/chat_template_utils.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from baton.node.errors import BadRequest, SettingsError

_DEVELOPER = "developer"


class ChatTemplate:
    """One compiled template; raises SettingsError where its source is no template."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
            constants = [node.value for node in environment.parse(source).find_all(nodes.Const)]
        except jinja2.TemplateError as error:
            raise SettingsError(f"the model's chat template cannot be read: {error}") from None
        self._knows_developer = any(isinstance(value, str) and _DEVELOPER in value for value in constants)
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt text that asks the assistant for its next message; BadRequest where the template refuses."""
        try:
            return self._template.render(
                messages=[self._known(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            )
        # A template is a program of the model's author: besides raise_exception it fails in any way on what it
        # did not expect, and for the client each of them means that these messages do not fit this model.
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
            raise BadRequest(
                f"the model's chat template does not accept these messages: {error}", param="messages"
            ) from None

    def _known(self, message: Mapping[str, str]) -> dict[str, str]:
        """`developer` is OpenAI's newer name of `system`; most templates drop a role that they do not know."""
        if self._knows_developer or message.get("role") != _DEVELOPER:
            return dict(message)
        return {**message, "role": "system"}


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
