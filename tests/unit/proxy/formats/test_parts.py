"""Parts of the formats: ids of calls, what a prompt says about reasoning, the tables' own rules, values of parameters.

Guards against ids that change when a request is repeated, reasoning that is shown as content (or the reverse), and
markers of which one is the beginning of another.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.proxy.formats.events import call_id
from baton.proxy.formats.json_reader import StringReader
from baton.proxy.formats.markup import THINK, Thinking, make_markup, thinking_of
from baton.proxy.formats.parameters import ParameterWriter
from baton.proxy.formats.tables import CONTENT, FORMATS, CallFormat

START, END, TURN = 9, 10, 1


def test_ids_repeat_and_differ() -> None:
    ids = {call_id(request, choice, index) for request in "ab" for choice in (0, 1) for index in (0, 1)}
    assert len(ids) == 8 and call_id("a", 0, 1) in ids
    assert all(each.startswith("call_") and len(each) == 29 for each in ids)
    short = call_id("a", 0, 0, num_alphanumerics=9)
    assert len(short) == 9 and short.isalnum() and short == call_id("a", 0, 0, num_alphanumerics=9)


@pytest.mark.parametrize(
    ("prompt", "thinking"),
    [
        ([START, 5, END, TURN, 7], Thinking.UNKNOWN),
        ([TURN, 7, START, 8], Thinking.OPEN),
        ([START], Thinking.OPEN),
        ([TURN, 7, START, 8, END, 8], Thinking.CLOSED),
        ([START, TURN], Thinking.UNKNOWN),
        ([], Thinking.UNKNOWN),
    ],
)
def test_thinking_of_a_prompt(prompt: list[int], thinking: Thinking) -> None:
    assert thinking_of(prompt, [START], [END], {TURN}) is thinking


def test_markers_of_several_tokens_are_found_in_the_prompt() -> None:
    assert thinking_of([TURN, 3, 4, 6], [3, 4], [3, 5], {TURN}) is Thinking.OPEN
    assert thinking_of([TURN, 3, 4, 3, 5], [3, 4], [3, 5], {TURN}) is Thinking.CLOSED
    assert thinking_of([4, TURN], [3, 4], [3, 5], {TURN}) is Thinking.UNKNOWN


@pytest.mark.parametrize("format", FORMATS.values(), ids=lambda format: format.name)
def test_tables_are_sound(format: CallFormat) -> None:
    for state in make_markup(format, THINK, {}).states.values():
        row = state.row
        assert {*row.moves.values(), *row.peeks.values(), row.then} <= {*format.states, "reasoning", "undecided"}
        assert not any(a != b and b.startswith(a) for a, b in itertools.product(row.moves, repeat=2))
    assert format.ends_reasoning <= set(format.states[CONTENT].moves)


class Sink:
    def __init__(self) -> None:
        self.text = ""

    def begin(self, name: str) -> bool:
        return True

    def arguments(self, text: str) -> None:
        self.text += text


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "null", "null"),
        ({"type": "string"}, '{"a": 1}', '{"a": 1}'),
        ({"type": "integer"}, "12", 12),
        ({"type": "integer"}, "twelve", "twelve"),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": "boolean"}, "False", False),
        ({"type": ["string", "null"]}, "None", None),
        ({"type": ["string", "null"]}, "5", "5"),
        ({"anyOf": [{"type": "string"}, {"type": "number"}]}, "5", 5),
        ({"enum": ["5", "6"]}, "5", "5"),
        ({"type": "array"}, "[1, 2", "[1, 2"),
        ({"type": "array"}, "[" * 100_000, "[" * 100_000),
        ({}, ' {"a": [1]} ', {"a": [1]}),
        (None, "x", "x"),
    ],
)
def test_values_by_the_types_of_the_schema(schema: Any, text: str, value: Any) -> None:
    sink = Sink()
    writer = ParameterWriter(sink, {"properties": {"k": schema}})
    writer.begin("k")
    for char in text:
        writer.text(char)
    writer.end()
    writer.close()
    assert json.loads(sink.text) == {"k": value}


@given(text=st.text(), ascii=st.booleans())
def test_strings_are_decoded_as_json_does(text: str, ascii: bool) -> None:
    written = json.dumps(text, ensure_ascii=ascii)[1:]
    reader, decoded, place = StringReader(), "", 0
    while not reader.done:
        piece, place = reader.take(written, place, len(written))
        decoded += piece
    assert decoded == text and place == len(written)
