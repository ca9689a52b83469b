"""Calls come back as they were written, in every format and however the text is cut into tokens.

The failures these tests guard against are parsers whose result depends on where a token ends, markers of the format
inside of strings, and time that grows faster than the text.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.proxy.formats.markup import THINK, Thinking
from baton.proxy.formats.tables import FORMATS
from baton.tests.unit.proxy.formats.renderers import (
    RENDERERS,
    Call,
    Read,
    cut,
    machine_of,
    markers_of,
    random_cut,
    run,
    text_tokens,
    token_ids,
    with_ids,
)

NUM_CASES = 300
"""A format; a change of the machine deserves thirty times as many once."""
WORDS = ["", " ", "\n", "a", "é", "漢", "😀", '"', "'", "\\", "{", "}", "[", "]", "(", ")", ",", ";", "`", "<", "None"]
VALUE_ENDS = {
    "qwen3_xml": ("</parameter>", "\n</function>", "\n<parameter=", "\n</tool_call>"),
    "glm45": ("</arg_value>",),
}
PROSE = ["", "Let me see.", "A < b\n\n", " \n x", "<tool", "é 漢\n"]


def random_string(source: random.Random, name: str, depth: int) -> str:
    text = "".join(source.choices([*WORDS, *markers_of(name)], k=source.randint(0, 4)))
    if name in VALUE_ENDS and not depth:  # raw text ends where its tag does
        while any(end in f"\n{text}\n" for end in VALUE_ENDS[name]):
            text = text[1:]
    return text


def random_value(source: random.Random, name: str, kind: str, depth: int = 0) -> Any:
    if kind == "s":
        return random_string(source, name, depth)
    if kind in "ao" and depth < 2:
        kinds = source.choices("sinbu", k=source.randint(0, 3))
        values = [random_value(source, name, each, depth + 1) for each in kinds]
        return values if kind == "a" else {f"k{place}": value for place, value in enumerate(values)}
    if kind == "u":
        return None
    numbers = {"i": source.randint(-9, 10**12), "n": source.choice((0.5, -1e-07, 3)), "b": source.random() < 0.5}
    return numbers[kind]


def random_calls(source: random.Random, name: str) -> list[Call]:
    calls: list[Call] = []
    for _ in range(source.choice((1, 1, 1, 2, 3))):
        keys = source.sample("sinbaou", source.randint(0, 3))
        function = source.choice(("f", "f", "f", "no-arguments" if name != "pythonic" else "get_weather"))
        arguments = {key: random_value(source, name, key) for key in keys} if function == "f" else {}
        calls.append((function, arguments))
    return calls


def assert_calls(read: Read, calls: list[Call], text: str) -> None:
    found = [(name, json.loads(arguments), broken) for name, arguments, broken in read.calls]
    assert found == [(name, arguments, False) for name, arguments in calls], text


@pytest.mark.parametrize("written", RENDERERS)
def test_random_calls_come_back_through_random_cuts(written: str) -> None:
    name, render = RENDERERS[written]
    source = random.Random(written)
    ids = token_ids(name)
    bare = FORMATS[name].start != "content"
    for _ in range(NUM_CASES):
        calls = random_calls(source, name)
        prose = "" if bare else source.choice(PROSE)
        text = prose + ("\n" if prose else "") + render(calls)
        read = run(machine_of(name, ids), with_ids(text, ids, source))
        assert_calls(read, calls, text)
        assert read.content == ("" if not prose.strip() else prose.rstrip("\n")), text


@pytest.mark.parametrize("written", RENDERERS)
@pytest.mark.parametrize("markers_are_tokens", [True, False])
def test_every_cut_in_two_gives_the_same(written: str, markers_are_tokens: bool) -> None:
    name, render = RENDERERS[written]
    calls: list[Call] = [("f", {"s": 'a "b" \\ }{\n', "i": 5, "a": [1, {"x": None}]}), ("get_weather", {"city": "漢"})]
    text = render(calls)
    if markers_are_tokens:
        ids = token_ids(name)
        tokens = with_ids(text, ids, random.Random(0))
        assert_calls(run(machine_of(name, ids), tokens), calls, text)
        return
    whole = run(machine_of(name), text_tokens([text]))
    assert_calls(whole, calls, text)
    assert run(machine_of(name), text_tokens(text)) == whole
    for place in range(len(text)):
        assert run(machine_of(name), text_tokens(cut(text, [place]))) == whole


def soup(name: str) -> st.SearchStrategy[str]:
    """Texts made of the format's markers and of what may stand between them, mostly no calls."""
    parts = [
        *markers_of(name), "<think>", "</think>", "\n", " ", "{", "}", "[", "]", "(", ")", ",", ":", ";", '"', "\\",
        "'", ">", "=", "f", "get_weather", '{"name": "f", "arguments": {"s": "x', '"}}', "unknown", "u12", "é", "1",
        "`",
    ]  # fmt: skip
    return st.lists(st.sampled_from(parts), max_size=24).map("".join)


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
def test_any_text_in_any_cut_gives_the_same(name: str, data: st.DataObject) -> None:
    text = data.draw(soup(name))
    thinking = data.draw(st.sampled_from(Thinking))
    places = data.draw(st.lists(st.integers(0, len(text)), max_size=8))

    def read(pieces: list[str]) -> Read:
        return run(machine_of(name, reasoning=THINK, thinking=thinking), text_tokens(pieces))

    whole = read([text])
    assert read(list(text)) == whole
    assert read(cut(text, places)) == whole


@pytest.mark.parametrize("name", FORMATS)
def test_random_characters_with_marker_tokens_raise_nothing_and_ignore_cuts(name: str) -> None:
    source = random.Random(name)
    ids = token_ids(name)
    for _ in range(NUM_CASES // 3):
        text = "".join(source.choices([*markers_of(name), *map(chr, range(1, 256))], k=40))
        text += "".join(source.choices([*markers_of(name), *'{}[]()",:\\\n f'], k=40))
        reads = {run(machine_of(name, ids), with_ids(text, ids, source)) for _ in range(3)}
        assert len(reads) == 1, text


def steps_of(name: str, pieces: list[str]) -> int:
    """Lines of Python that reading takes: a measure of time without a clock."""
    steps = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal steps
        steps += 1
        return trace

    machine = machine_of(name, reasoning=THINK)
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for piece in pieces:
            machine.push(0, piece)
        machine.finish()
    finally:
        sys.settrace(before)
    return steps


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("by_character", [True, False])
def test_steps_grow_with_the_text_only(name: str, by_character: bool) -> None:
    markers = markers_of(name)
    for part in (*markers, *(f"{marker}{{" for marker in markers), "\n", "<", '{"name": "', "[f(a=[", "{[", '\\"'):
        for head in ("", markers[0], '{"name": "f", "arguments": {"s": "', "[f(s='", "<function=f><parameter=s>"):
            pieces = [head + part * count for count in (25, 100)]
            small, large = (steps_of(name, list(each) if by_character else [each]) for each in pieces)
            assert large < 8 * small + 200, (head, part)  # four times the text; quadratic: sixteen times


def test_what_is_held_back_is_bounded() -> None:
    """A text that never becomes a call must not be kept for ever."""
    machine = machine_of("hermes")
    events = machine.push(0, "<tool_call>" + '{"arguments": "' + "x" * 600_000)
    assert sum(len(getattr(event, "text", "")) for event in events) > 300_000


def test_random_cut_keeps_the_text() -> None:
    source = random.Random(0)
    assert all("".join(random_cut(text, source)) == text for text in itertools.repeat("abcdefghij" * 9, 20))
