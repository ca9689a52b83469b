"""Writes calls as models do, one function a format, and reads them with the machine: what the tests share."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from baton.proxy.formats.events import CallArguments, CallBegin, CallEnd, ContentText, FormatEvent, ReasoningText
from baton.proxy.formats.machine import FormatMachine
from baton.proxy.formats.markup import ReasoningMarkers, Thinking, make_markup
from baton.proxy.formats.tables import FORMATS

TOOLS: Mapping[str, Mapping[str, Any]] = {
    "f": {
        "type": "object",
        "properties": {
            "s": {"type": "string"},
            "i": {"type": "integer"},
            "n": {"type": "number"},
            "b": {"type": "boolean"},
            "a": {"type": "array"},
            "o": {"type": "object"},
            "u": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        },
    },
    "get_weather": {"type": "object", "properties": {"city": {"type": "string"}}},
    "no-arguments": {},
}

Call = tuple[str, dict[str, Any]]


class Read(NamedTuple):
    content: str
    reasoning: str
    calls: tuple[tuple[str, str, bool], ...]
    """Name, arguments, whether broken."""


def read_events(events: Iterable[FormatEvent]) -> Read:
    """Joins the events, and checks that they come in an order that an encoder can send."""
    content, reasoning = "", ""
    calls: list[tuple[str, str, bool]] = []
    ids: set[str] = set()
    is_open = False
    for event in events:
        if isinstance(event, ContentText | ReasoningText):
            assert event.text and not is_open
            content += event.text if isinstance(event, ContentText) else ""
            reasoning += event.text if isinstance(event, ReasoningText) else ""
        elif isinstance(event, CallBegin):
            written = event.id.endswith(f"{event.name}:{event.id.rpartition(':')[2]}")
            assert event.index == len(calls) and (event.id == f"id{event.index}" or written) and not is_open
            assert event.id not in ids
            ids.add(event.id)
            calls.append((event.name, "", False))
            is_open = True
        else:
            assert event.index == len(calls) - 1 and is_open
            name, arguments, _ = calls[-1]
            if isinstance(event, CallArguments):
                assert event.text
                calls[-1] = name, arguments + event.text, False
            elif isinstance(event, CallEnd):
                calls[-1] = name, arguments, event.broken
                is_open = False
    assert not is_open
    return Read(content, reasoning, tuple(calls))


def machine_of(
    name: str,
    ids: Mapping[str, int] | None = None,
    *,
    reasoning: ReasoningMarkers | None = None,
    thinking: Thinking = Thinking.UNKNOWN,
    max_calls: int | None = None,
) -> FormatMachine:
    markup = make_markup(FORMATS[name], reasoning, ids or {})
    return FormatMachine(markup, thinking, TOOLS, lambda index: f"id{index}", max_calls=max_calls)


def run(machine: FormatMachine, tokens: Iterable[tuple[int, str]]) -> Read:
    events = [event for token in tokens for event in machine.push(*token)]
    return read_events(events + machine.finish())


def text_tokens(pieces: Iterable[str]) -> list[tuple[int, str]]:
    return [(0, piece) for piece in pieces]


def cut(text: str, places: Iterable[int]) -> list[str]:
    borders = sorted({0, len(text), *places})
    return [text[a:b] for a, b in itertools.pairwise(borders)]


def random_cut(text: str, source: random.Random) -> list[str]:
    size = source.choice((1, 2, 3, 5, 16, 1000))
    pieces, place = [], 0
    while place < len(text):
        length = source.randint(1, size)
        pieces.append(text[place : place + length])
        place += length
    return pieces


def with_ids(text: str, ids: Mapping[str, int], source: random.Random) -> list[tuple[int, str]]:
    """Tokens of a text in which markers are tokens of their own."""
    tokens: list[tuple[int, str]] = []
    start = place = 0
    while place < len(text):
        marker = next((each for each in ids if text.startswith(each, place)), "")
        if marker:
            tokens += text_tokens(random_cut(text[start:place], source))
            tokens.append((ids[marker], marker))
            start = place = place + len(marker)
        else:
            place += 1
    return tokens + text_tokens(random_cut(text[start:], source))


def markers_of(name: str) -> list[str]:
    return sorted({marker for state in FORMATS[name].states.values() for marker in state.moves if len(marker) > 1})


def token_ids(name: str) -> dict[str, int]:
    """Ids for the markers that models of this format have as tokens."""
    textual = ("\n", "```", "</parameter", "<parameter", "</function", "<function", "to=")
    tokens = [marker for marker in markers_of(name) if not marker.startswith(textual)]
    return {marker: 1000 + place for place, marker in enumerate(tokens)}


def _object(call: Call, key: str = "arguments") -> str:
    return f'{{"name": "{call[0]}", "{key}": {json.dumps(call[1], ensure_ascii=False)}}}'


def hermes(calls: Sequence[Call]) -> str:
    return "\n".join(f"<tool_call>\n{_object(call)}\n</tool_call>" for call in calls)


def llama3_json(calls: Sequence[Call]) -> str:
    return "; ".join(_object(call, "parameters") for call in calls)


def qwen3_xml(calls: Sequence[Call]) -> str:
    return "\n".join(f"<tool_call>\n{_function(*call)}</tool_call>" for call in calls)


def _function(name: str, arguments: Mapping[str, Any]) -> str:
    parameters = "".join(
        f"<parameter={key}>\n{value if isinstance(value, str) else json.dumps(value)}\n</parameter>\n"
        for key, value in arguments.items()
    )
    return f"<function={name}>\n{parameters}</function>\n"


def glm45(calls: Sequence[Call]) -> str:
    return "\n".join(f"<tool_call>{name}\n{_pairs(arguments)}</tool_call>" for name, arguments in calls)


def _pairs(arguments: Mapping[str, Any]) -> str:
    written = ((key, value if isinstance(value, str) else json.dumps(value)) for key, value in arguments.items())
    return "".join(f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n" for key, value in written)


def pythonic(calls: Sequence[Call]) -> str:
    written = (f"{name}({', '.join(f'{key}={value!r}' for key, value in args.items())})" for name, args in calls)
    return f"[{', '.join(written)}]"


def mistral(calls: Sequence[Call]) -> str:
    return f"[TOOL_CALLS] [{', '.join(_object(call) for call in calls)}]"


def mistral_v11(calls: Sequence[Call]) -> str:
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{json.dumps(arguments)}" for name, arguments in calls)


def deepseek_v3(calls: Sequence[Call]) -> str:
    bodies = (f"function<｜tool▁sep｜>{name}\n```json\n{json.dumps(arguments)}\n```" for name, arguments in calls)
    return _deepseek(bodies, "\n")


def deepseek_v31(calls: Sequence[Call]) -> str:
    return _deepseek((f"{name}<｜tool▁sep｜>{json.dumps(arguments)}" for name, arguments in calls), "")


def _deepseek(bodies: Iterable[str], between: str) -> str:
    written = between.join(f"<｜tool▁call▁begin｜>{body}<｜tool▁call▁end｜>" for body in bodies)
    return f"<｜tool▁calls▁begin｜>{written}<｜tool▁calls▁end｜>"


def kimi_k2(calls: Sequence[Call]) -> str:
    written = "".join(
        f"<|tool_call_begin|>functions.{name}:{place}<|tool_call_argument_begin|>{json.dumps(arguments)}<|tool_call_end|>"
        for place, (name, arguments) in enumerate(calls)
    )
    return f"<|tool_calls_section_begin|>{written}<|tool_calls_section_end|>"


def harmony(calls: Sequence[Call]) -> str:
    head = "<|channel|>commentary to=functions."
    written = (f"{name} <|constrain|>json<|message|>{json.dumps(arguments)}" for name, arguments in calls)
    return head + f"<|call|><|start|>assistant{head}".join(written)


RENDERERS: Mapping[str, tuple[str, Callable[[Sequence[Call]], str]]] = {
    "hermes": ("hermes", hermes),
    "llama3_json": ("llama3_json", llama3_json),
    "qwen3_xml": ("qwen3_xml", qwen3_xml),
    "pythonic": ("pythonic", pythonic),
    "mistral": ("mistral", mistral),
    "mistral_v11": ("mistral", mistral_v11),
    "deepseek_v3": ("deepseek_v3", deepseek_v3),
    "deepseek_v31": ("deepseek_v31", deepseek_v31),
    "kimi_k2": ("kimi_k2", kimi_k2),
    "glm45": ("glm45", glm45),
    "harmony": ("harmony", harmony),
}
"""How calls are written -> the format, and the function that writes."""
