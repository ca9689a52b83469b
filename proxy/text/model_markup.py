"""How one model marks calls and reasoning in its output, by its template and its vocabulary, and in its prompts.

Knows no requests.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from baton.node.api_settings import AUTO
from baton.node.errors import BatonError
from baton.proxy.formats.detect import detect_calls, detect_reasoning
from baton.proxy.formats.markup import REASONINGS, ReasoningMarkers, Thinking, make_markup, thinking_of
from baton.proxy.formats.tables import FORMATS, PLAIN
from baton.proxy.text.grammar_request import Reasoning


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
        reasoning_format: str = AUTO,
    ) -> None:
        """`added_tokens`: ids by text; formats are of TOOL_FORMATS and REASONING_FORMATS."""
        found = detect_calls(template, added_tokens)
        calls = found if tool_format == AUTO else FORMATS.get(tool_format)
        reasoning = (
            detect_reasoning(template, added_tokens) if reasoning_format == AUTO else REASONINGS.get(reasoning_format)
        )
        self.has_calls = calls is not None
        self.with_calls = make_markup(calls or PLAIN, reasoning, added_tokens)
        written = calls or found or PLAIN
        self.has_channels = written.has_channels
        """All answers have to be read, also those without calls and reasoning."""
        self.without_calls = make_markup(written if written.has_channels else PLAIN, reasoning, added_tokens)
        self.with_grammar = make_markup(replace(calls or PLAIN, ends_reasoning=frozenset()), reasoning, added_tokens)
        """Of answers whose form a grammar gives, which begins behind the end marker of reasoning only."""
        self.has_reasoning = reasoning is not None
        self._reasoning = None if reasoning is None else _with_ids(reasoning, added_tokens, encode)
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

    def before_form(self, thinking: Thinking) -> Reasoning | None:
        """What comes before an answer of a given form."""
        if self._reasoning is None or thinking is Thinking.CLOSED:
            return None
        return replace(self._reasoning, begun=thinking is Thinking.OPEN)


def _with_ids(
    markers: ReasoningMarkers, added_tokens: Mapping[str, int], encode: Callable[[str], Sequence[int]]
) -> Reasoning:
    found = Reasoning(markers.start, markers.end, begun=False)
    if markers.start not in added_tokens or markers.end not in added_tokens:
        return found
    blanks = (_encoded(text, encode) for text in ("\n", "\n\n"))
    return replace(
        found,
        start_ids=(added_tokens[markers.start],),
        end_ids=(added_tokens[markers.end],),
        blank_ids=tuple(ids[0] for ids in blanks if len(ids) == 1),
    )


def _encoded(marker: str, encode: Callable[[str], Sequence[int]]) -> tuple[int, ...]:
    """Empty where the model's tokenizer fails: then nothing is known of its prompts."""
    try:
        return tuple(encode(marker))
    except BatonError:
        return ()
