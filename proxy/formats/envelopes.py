"""How each format's calls are written where a grammar forces them: what stands around their names and arguments.

The texts are those of the models' chat templates, white space included; the markers in them are those of `tables`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto


class ArgumentStyle(Enum):
    """How the arguments of a call are written."""

    JSON = auto()
    """One object."""
    TAGS = auto()
    """Raw text between tags, one pair a parameter."""
    PYTHON = auto()
    """Keyword arguments."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """The text of a group of calls: `opens`, calls with `between` in the middle, `closes`."""

    before: str
    """In front of a function's name; what a group begins with is a marker, unless it has a `tag`."""
    behind: str
    """Between the name and the arguments."""
    after: str
    """Behind the arguments."""
    between: str = ""
    opens: str = ""
    closes: str = ""
    style: ArgumentStyle = ArgumentStyle.JSON
    has_index: bool = False
    """A colon and a number follow a function's name."""
    tag: tuple[str, str] | None = None
    """Markers that may stand around a group; without them, a group begins an answer, and is known by its first
    character."""


_JSON_BEFORE = '{"name": "'
_JSON_BEHIND = '", "arguments": '
_KIMI = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")
_DEEPSEEK = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")

ENVELOPES: Mapping[str, Envelope] = {
    "hermes": Envelope(f"<tool_call>\n{_JSON_BEFORE}", _JSON_BEHIND, "}\n</tool_call>", "\n"),
    "llama3_json": Envelope(_JSON_BEFORE, '", "parameters": ', "}", tag=("<|python_tag|>", "")),
    "qwen3_xml": Envelope(
        "<tool_call>\n<function=", ">\n", "</function>\n</tool_call>", "\n", style=ArgumentStyle.TAGS
    ),
    "pythonic": Envelope(
        *("", "(", ")", ", ", "[", "]"), style=ArgumentStyle.PYTHON, tag=("<|python_start|>", "<|python_end|>")
    ),
    "mistral": Envelope(_JSON_BEFORE, _JSON_BEHIND, "}", ", ", "[TOOL_CALLS] [", "]"),
    "mistral_v11": Envelope("[TOOL_CALLS]", "[ARGS]", ""),
    "deepseek_v3": Envelope(
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>", "\n```json\n", "\n```<｜tool▁call▁end｜>", "\n", *_DEEPSEEK
    ),
    "kimi_k2": Envelope(
        "<|tool_call_begin|>functions.", "<|tool_call_argument_begin|>", "<|tool_call_end|>", "", *_KIMI, has_index=True
    ),
    "harmony": Envelope("<|channel|>commentary to=functions.", " <|constrain|>json<|message|>", ""),
    "deepseek_v31": Envelope("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "", *_DEEPSEEK),
}
"""By the name of the format; calls of others are read, and not forced."""
