"""Writing a grammar in llguidance's dialect of Lark: rules and terminals with names of their own. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping


class LarkWriter:
    """The rules of one grammar. Bodies are of Lark; texts become literals, markers that are tokens the tokens."""

    def __init__(self, tokens: Mapping[str, int]) -> None:
        """`tokens`: ids of markers by their text."""
        self._tokens = tokens
        self._rules: dict[tuple[str, str], str] = {}
        """Names by what is behind them, so that equal ones are one."""
        self._marker = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")

    def rule(self, body: str, options: str = "") -> str:
        """The name of a rule; `options`: "lazy", or "suffix=..."."""
        return self._named("r", f"[{options}]: {body}" if options else f": {body}")

    def terminal(self, body: str) -> str:
        """The name of a terminal: one piece for the lexer."""
        return self._named("T", f": {body}")

    def text(self, text: str) -> str:
        """What spells `text`; nothing for an empty one."""
        parts: list[str] = []
        place = 0
        for found in self._marker.finditer(text):  # over our own texts
            parts += literal(text[place : found.start()]), f"<[{self._tokens[found[0]]}]>"
            place = found.end()
        return joined([*parts, literal(text[place:])])

    def grammar(self, start: str) -> str:
        return "\n".join([f"start: {start}", *(name + rest for (_, rest), name in self._rules.items())])

    def _named(self, kind: str, rest: str) -> str:
        return self._rules.setdefault((kind, rest), f"{kind}{len(self._rules)}")


def literal(text: str) -> str:
    """A text as Lark; nothing for an empty one."""
    return json.dumps(text, ensure_ascii=False) if text else ""


def joined(parts: Iterable[str]) -> str:
    """Parts one after the other, without the empty ones."""
    return " ".join(part for part in parts if part)


def regex_of(text: str) -> str:
    """`text` inside of `/.../`."""
    return re.escape(text).replace("/", r"\/").replace("\\\n", r"\n")


def holds_none_of(texts: Iterable[str]) -> str:
    """A terminal's body: what has none of `texts` in it."""
    return rf"~/(.|\n)*({'|'.join(map(regex_of, texts))})(.|\n)*/"
