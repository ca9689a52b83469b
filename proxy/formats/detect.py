"""Which format of calls and which markers of reasoning a model has, by its chat template and its vocabulary.

A template shows earlier calls in the form in which the model writes new ones. Pure: texts in, a format out.
"""

from __future__ import annotations

from collections.abc import Collection

from baton.proxy.formats.markup import THINK, THINK_BRACKETS, ReasoningMarkers
from baton.proxy.formats.tables import (
    DEEPSEEK_V3,
    DEEPSEEK_V31,
    GLM45,
    HARMONY,
    HERMES,
    KIMI_K2,
    LLAMA3_JSON,
    MISTRAL,
    MISTRAL_V11,
    PYTHONIC,
    QWEN3_XML,
    CallFormat,
)

_OF_OTHER_FORMATS = ("｜DSML｜",)
"""Parts of templates whose formats have no table yet, though they may have markers of one that has."""
_PYTHON_EXAMPLE = ("[func_name1(", "<|python_start|>")


def detect_calls(template: str, added_tokens: Collection[str]) -> CallFormat | None:
    """None where the template knows no tools, or the format has no table; `added_tokens`: their texts."""
    if "tools" not in template or any(part in template for part in _OF_OTHER_FORMATS):
        return None
    if "<|channel|>" in template:
        return HARMONY if "<|message|>" in template else None
    if "<arg_key>" in template:
        return GLM45
    if "<|tool_calls_section_begin|>" in template:
        return KIMI_K2
    if "<function=" in template:
        return QWEN3_XML
    if "<tool_call>" in template:
        return HERMES
    if "<｜tool▁calls▁begin｜>" in template:
        return DEEPSEEK_V3 if "```json" in template else DEEPSEEK_V31
    if "[TOOL_CALLS]" in template:
        return MISTRAL_V11 if "[ARGS]" in template else MISTRAL
    if any(part in template for part in _PYTHON_EXAMPLE):
        return PYTHONIC
    if "<|python_tag|>" in added_tokens and "parameters" in template:
        return LLAMA3_JSON
    return None


def detect_reasoning(template: str, added_tokens: Collection[str]) -> ReasoningMarkers | None:
    """A model reasons between markers if its template mentions them, or they are tokens of its vocabulary."""
    for markers in (THINK, THINK_BRACKETS):
        if markers.end in template or (markers.start in added_tokens and markers.end in added_tokens):
            return markers
    return None
