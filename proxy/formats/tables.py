"""The formats of tool calls as tables: states, what text means in each of them, and the markers that lead to others.

A marker that is one token of the vocabulary is recognised by that token's id only; others by their text. A format is
added as a table here and a line in `detect`. Knows no model output. Sources: the chat templates of the model families.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, auto

CONTENT = "content"
"""The state outside calls that all formats have; a region that proves to be no call ends there, as content."""
ANALYSIS, ARGUMENTS = "analysis", "arguments"
"""States that a header leads to, besides content."""
BLANK = " \t\r\n"


class Reads(Enum):
    """What the text in a state is."""

    CONTENT = auto()
    REASONING = auto()
    GAP = auto()
    """The characters of `skips`, which mean nothing; the first other one leads on."""
    HEADER = auto()
    """Text up to a marker that means nothing."""
    NAME = auto()
    """The function's name, up to a marker: the call begins there if it is declared."""
    CALL = auto()
    """A JSON object with name and arguments."""
    ARGUMENTS = auto()
    """The JSON value of the arguments."""
    KEY = auto()
    """The name of one parameter, up to a marker."""
    VALUE = auto()
    """The value of that parameter as raw text, up to a marker of this state. All others are text here, also those that
    are tokens."""
    PYTHON = auto()
    """Keyword arguments of a Python call, to its closing parenthesis."""
    CHANNEL = auto()
    """The header of a part of the answer, up to the marker that leads to `content`: it says what the part is."""


@dataclass(frozen=True, slots=True)
class FormatState:
    """A row of a format's table."""

    reads: Reads
    moves: Mapping[str, str] = field(default_factory=dict)
    """Marker -> the next state. No marker of a state is the beginning of another one."""
    then: str = CONTENT
    """The next state when what it reads is complete; of a gap, at the first character that it does not skip."""
    peeks: Mapping[str, str] = field(default_factory=dict)
    """Of a gap or a name: characters that lead to another state, which reads them."""
    skips: str = BLANK
    opens: bool = False
    """A call may begin from here on; if it does not, the text from here on is content."""
    inside: bool = False
    """A call that has begun goes on in this state."""
    has_index: bool = False
    """Of NAME: the text is `functions.NAME:INDEX`, which is also the id of the call."""
    strict: bool = False
    """Of CALL: an object without arguments, or with keys that no call has, is content."""


@dataclass(frozen=True, slots=True)
class CallFormat:
    """How one family of models writes calls."""

    name: str
    states: Mapping[str, FormatState]
    start: str = CONTENT
    """The state at the start of the answer, after any reasoning."""
    ends_reasoning: frozenset[str] = frozenset()
    """Markers of `content` that also end an open reasoning."""
    id_alphanumerics: int = 0
    """Length of the ids of calls where they are letters and digits only; 0: OpenAI's form."""
    one_call: bool = False
    """Templates of these models take one call a message."""
    bare_values: bool = False
    """A line break behind the marker that begins a value is part of the value."""
    has_channels: bool = False
    """All of an answer is parts with headers, of which none is ever content."""


PLAIN = CallFormat("", {CONTENT: FormatState(Reads.CONTENT)})
"""No calls: all text outside reasoning is content."""

HERMES = CallFormat(
    "hermes",
    {
        CONTENT: FormatState(Reads.CONTENT, {"<tool_call>": "call"}),
        "call": FormatState(Reads.CALL, {"</tool_call>": CONTENT}, then="called", opens=True, inside=True),
        "called": FormatState(Reads.GAP, {"</tool_call>": CONTENT, "<tool_call>": "call"}),
    },
    ends_reasoning=frozenset({"<tool_call>"}),
)

LLAMA3_JSON = CallFormat(
    "llama3_json",
    {
        "first": FormatState(Reads.GAP, {"<|python_tag|>": "tagged"}, peeks={"{": "call"}),
        CONTENT: FormatState(Reads.CONTENT, {"<|python_tag|>": "tagged"}),
        "tagged": FormatState(Reads.CALL, then="called", opens=True, inside=True, strict=True),
        "call": FormatState(Reads.CALL, then="called", opens=True, inside=True, strict=True),
        "called": FormatState(Reads.GAP, {"<|python_tag|>": "tagged"}, peeks={"{": "call"}, skips=BLANK + ";"),
    },
    start="first",
    ends_reasoning=frozenset({"<|python_tag|>"}),
    one_call=True,
)

QWEN3_XML = CallFormat(
    "qwen3_xml",
    {
        CONTENT: FormatState(Reads.CONTENT, {"<tool_call>": "tag", "<function=": "name"}),
        "tag": FormatState(Reads.GAP, {"<function=": "name", "</tool_call>": CONTENT}, opens=True),
        "name": FormatState(Reads.NAME, {">": "parameters"}, opens=True),
        "parameters": FormatState(
            Reads.GAP,
            {
                "<parameter=": "key",
                "</function>": "called",
                "</tool_call>": CONTENT,
                "<function=": "name",
                "<tool_call>": "tag",
            },
            inside=True,
        ),
        "key": FormatState(Reads.KEY, {">": "value"}, inside=True),
        # One line break at the end of a value belongs to the tag; before it, tags that follow a missing one count, too.
        "value": FormatState(
            Reads.VALUE,
            {
                "\n</parameter>": "parameters",
                "</parameter>": "parameters",
                "\n<parameter=": "key",
                "\n</function>": "called",
                "\n</tool_call>": CONTENT,
            },
            inside=True,
        ),
        "called": FormatState(Reads.GAP, {"</tool_call>": CONTENT, "<function=": "name", "<tool_call>": "tag"}),
    },
    ends_reasoning=frozenset({"<tool_call>"}),
)

GLM45 = CallFormat(
    "glm45",
    {
        CONTENT: FormatState(Reads.CONTENT, {"<tool_call>": "name"}),
        "name": FormatState(Reads.NAME, {"<arg_key>": "key", "</tool_call>": CONTENT}, opens=True),
        "key": FormatState(Reads.KEY, {"</arg_key>": "keyed"}, inside=True),
        "keyed": FormatState(Reads.GAP, {"<arg_value>": "value"}, inside=True),
        "value": FormatState(Reads.VALUE, {"</arg_value>": "parameters"}, inside=True),
        "parameters": FormatState(
            Reads.GAP, {"<arg_key>": "key", "</tool_call>": CONTENT, "<tool_call>": "name"}, inside=True
        ),
    },
    ends_reasoning=frozenset({"<tool_call>"}),
    bare_values=True,
)

PYTHONIC = CallFormat(
    "pythonic",
    {
        "first": FormatState(Reads.GAP, {"<|python_start|>": "tagged", "[": "name"}),
        CONTENT: FormatState(Reads.CONTENT, {"<|python_start|>": "tagged"}),
        "tagged": FormatState(Reads.GAP, {"[": "name"}, opens=True),
        "name": FormatState(Reads.NAME, {"(": "arguments"}, opens=True),
        "arguments": FormatState(Reads.PYTHON, {"<|python_end|>": CONTENT}, then="called", inside=True),
        "called": FormatState(Reads.GAP, {",": "name", "]": "closed", "<|python_end|>": CONTENT}),
        "closed": FormatState(Reads.GAP, {"<|python_end|>": CONTENT, "<|python_start|>": "tagged"}),
    },
    start="first",
    ends_reasoning=frozenset({"<|python_start|>"}),
)

MISTRAL = CallFormat(
    "mistral",
    {
        CONTENT: FormatState(Reads.CONTENT, {"[TOOL_CALLS]": "opened"}),
        # Up to version 3 a list of JSON objects, from version 11 on a name and arguments.
        "opened": FormatState(Reads.GAP, peeks={"[": "list"}, then="name", opens=True),
        "list": FormatState(Reads.GAP, {"[": "call"}, opens=True),
        "call": FormatState(Reads.CALL, then="listed", opens=True, inside=True),
        "listed": FormatState(Reads.GAP, {",": "call", "]": CONTENT}),
        "name": FormatState(
            Reads.NAME, {"[ARGS]": "arguments", "[CALL_ID]": "id"}, peeks={"{": "arguments"}, opens=True
        ),
        "id": FormatState(Reads.HEADER, {"[ARGS]": "arguments"}, inside=True),
        "arguments": FormatState(Reads.ARGUMENTS, inside=True),
    },
    ends_reasoning=frozenset({"[TOOL_CALLS]"}),
    id_alphanumerics=9,
)

MISTRAL_V11 = replace(MISTRAL, name="mistral_v11")
"""The same for reading."""

_DEEPSEEK_TAGS = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>")
_SEP = "<｜tool▁sep｜>"


def _nested(
    name: str, tags: tuple[str, str, str, str], first: str, skips: str, states: Mapping[str, FormatState]
) -> CallFormat:
    """A pair of tags around all calls and another one around each; `first` is the state after the tag that begins a
    call."""
    calls_begin, calls_end, call_begin, call_end = tags
    after = {call_end: "calls", calls_end: CONTENT, call_begin: first}
    return CallFormat(
        name,
        {
            CONTENT: FormatState(Reads.CONTENT, {calls_begin: "section", call_begin: first}),
            "section": FormatState(Reads.GAP, {call_begin: first, calls_end: CONTENT}, opens=True),
            "calls": FormatState(Reads.GAP, {call_begin: first, calls_end: CONTENT}),
            "arguments": FormatState(Reads.ARGUMENTS, after, then="called", inside=True),
            "called": FormatState(Reads.GAP, after, skips=skips),
            **states,
        },
        ends_reasoning=frozenset({calls_begin, call_begin}),
    )


DEEPSEEK_V3 = _nested(
    "deepseek_v3",
    _DEEPSEEK_TAGS,
    "kind",
    BLANK + "`",
    {
        "kind": FormatState(Reads.HEADER, {_SEP: "name"}, opens=True),
        "name": FormatState(Reads.NAME, {"```json": "arguments"}),
    },
)
DEEPSEEK_V31 = _nested(
    *("deepseek_v31", _DEEPSEEK_TAGS, "name", BLANK),
    {"name": FormatState(Reads.NAME, {_SEP: "arguments"}, opens=True)},
)
KIMI_K2 = _nested(
    "kimi_k2",
    ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_end|>"),
    "name",
    BLANK,
    {"name": FormatState(Reads.NAME, {"<|tool_call_argument_begin|>": "arguments"}, opens=True, has_index=True)},
)

_PART = {"<|channel|>": "header", "<|start|>": "header"}
"""Markers that begin the header of a part."""
_PART_END = {"<|end|>": "between", "<|call|>": "between", "<|return|>": "between"}

HARMONY = CallFormat(
    "harmony",
    {
        "first": FormatState(Reads.GAP, {**_PART, "to=": "header"}),  # the prompt ends with a header's beginning
        "header": FormatState(
            Reads.CHANNEL, {"<|message|>": CONTENT, "<|channel|>": "header", "<|constrain|>": "header"}
        ),
        CONTENT: FormatState(Reads.CONTENT, {**_PART, **_PART_END}),
        ANALYSIS: FormatState(Reads.REASONING, {**_PART, **_PART_END}),
        ARGUMENTS: FormatState(Reads.ARGUMENTS, {**_PART, **_PART_END}, then="between", inside=True),
        "between": FormatState(Reads.GAP, {**_PART, **_PART_END}),
    },
    start="first",
    one_call=True,
    has_channels=True,
)
"""gpt-oss: `<|channel|>` and a name, maybe a recipient, `<|message|>`, the part, and an end. Source: docs/format.md of
github.com/openai/harmony."""

FORMATS: Mapping[str, CallFormat] = {
    each.name: each
    for each in (
        *(HERMES, LLAMA3_JSON, QWEN3_XML, PYTHONIC, MISTRAL, MISTRAL_V11),
        *(DEEPSEEK_V3, DEEPSEEK_V31, KIMI_K2, GLM45, HARMONY),
    )
}
