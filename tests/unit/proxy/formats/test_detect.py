"""The format that a template and a vocabulary mean; a wrong guess loses every call of a model."""

from __future__ import annotations

import pytest

from baton.node.api_settings import AUTO, TOOL_FORMATS
from baton.proxy.formats.detect import detect_calls, detect_reasoning
from baton.proxy.formats.markup import THINK, THINK_BRACKETS
from baton.proxy.formats.tables import FORMATS

QWEN = "{% for tool in tools %}{{ tool }}{% endfor %}<tool_call>"
DEEPSEEK = "{{ tools }}<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>"


@pytest.mark.parametrize(
    ("template", "tokens", "name"),
    [
        (QWEN, ["<tool_call>"], "hermes"),
        (QWEN + "<function=name>", ["<tool_call>"], "qwen3_xml"),
        ('{{ tools }}{"name": "x", "parameters": {}}', ["<|python_tag|>"], "llama3_json"),
        ("{{ tools }}[func_name1(params_name1=params_value1)]", ["<|python_tag|>"], "pythonic"),
        ("{{ tools }}<|python_start|>", ["<|python_start|>"], "pythonic"),
        ("{{ tools }}[TOOL_CALLS]", ["[TOOL_CALLS]"], "mistral"),
        ("{{ tools }}[TOOL_CALLS]f[ARGS]", ["[TOOL_CALLS]"], "mistral_v11"),
        (DEEPSEEK + "\n```json\n", [], "deepseek_v3"),
        (DEEPSEEK, [], "deepseek_v31"),
        ("{{ tools }}<|tool_calls_section_begin|><|tool_call_begin|>", [], "kimi_k2"),
        ("{{ tools }}<|channel|>final<|message|>", ["<|channel|>"], "harmony"),
        ("{{ tools }}<tool_call><arg_key>", ["<tool_call>"], "glm45"),
        ("{{ tools }}<｜DSML｜function_calls>", [], None),
        ("{{ messages }}", ["<tool_call>"], None),
        ("{{ tools }}", [], None),
    ],
)
def test_detect_calls(template: str, tokens: list[str], name: str | None) -> None:
    found = detect_calls(template, tokens)
    assert (found.name if found else None) == name


def test_detect_reasoning() -> None:
    assert detect_reasoning("", ["<think>", "</think>"]) is THINK
    assert detect_reasoning("{{ x.split('</think>') }}", []) is THINK
    assert detect_reasoning("", ["[THINK]", "[/THINK]"]) is THINK_BRACKETS
    assert detect_reasoning("{{ messages }}", ["<think>"]) is None


def test_an_option_can_name_every_table() -> None:
    assert set(TOOL_FORMATS) == {AUTO, "none", *FORMATS}
