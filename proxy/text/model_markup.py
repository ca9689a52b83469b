"""How one model marks calls and reasoning in its output, by its template and its vocabulary, and in its prompts.

Knows no requests.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from baton.node.api_settings import AUTO
from baton.node.errors import BatonError
from baton.proxy.formats.detect import detect_calls, detect_reasoning
from baton.proxy.formats.markup import Thinking, make_markup, thinking_of
from baton.proxy.formats.tables import FORMATS, PLAIN


class ModelMarkup:
    """The tables of one model, made once."""

    def __init__(
        self,
        template: str,
        added_tokens: Mapping[str, int],
        special_ids: Collection[int],
        encode: Callable[[str], Sequence[int]],
        *,
        tool_format: str = AUTO,
    ) -> None:
        """`added_tokens`: ids by text; `tool_format`: one of TOOL_FORMATS."""
        calls = detect_calls(template, added_tokens) if tool_format == AUTO else FORMATS.get(tool_format)
        reasoning = detect_reasoning(template, added_tokens)
        self.has_calls = calls is not None
        self.with_calls = make_markup(calls or PLAIN, reasoning, added_tokens)
        self.without_calls = make_markup(PLAIN, reasoning, added_tokens)
        self.has_reasoning = reasoning is not None
        self._boundaries = frozenset(special_ids)
        self._start: tuple[int, ...] = ()
        self._end: tuple[int, ...] = ()
        if reasoning is not None:
            self._start, self._end = (
                (added_tokens[marker],) if marker in added_tokens else _encoded(marker, encode)
                for marker in (reasoning.start, reasoning.end)
            )

    def thinking(self, prompt_ids: Sequence[int]) -> Thinking:
        """Whether the answer to a prompt begins inside reasoning."""
        if not self.has_reasoning:
            return Thinking.CLOSED
        return thinking_of(prompt_ids, self._start, self._end, self._boundaries)


def _encoded(marker: str, encode: Callable[[str], Sequence[int]]) -> tuple[int, ...]:
    """Empty where the model's tokenizer fails: then nothing is known of its prompts."""
    try:
        return tuple(encode(marker))
    except BatonError:
        return ()
