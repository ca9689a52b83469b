"""Levels of reasoning as variables of templates: of switches, of levels, of both and of neither."""

from __future__ import annotations

import pytest

from baton.node.errors import BadRequest
from baton.proxy.text.effort import effort_variables
from baton.proxy.text.template import variables_of

LEVEL = {"reasoning_effort"}


@pytest.mark.parametrize(
    ("effort", "known", "found"),
    [
        ("none", {"enable_thinking"}, {"enable_thinking": False}),
        ("none", {"thinking", "messages"}, {"thinking": False}),
        ("minimal", {"enable_thinking"}, {"enable_thinking": False}),
        ("low", {"enable_thinking"}, {"enable_thinking": True}),
        ("max", {"enable_thinking", "thinking"}, {"enable_thinking": True, "thinking": True}),
        ("minimal", LEVEL, {"reasoning_effort": "low"}),
        ("low", LEVEL, {"reasoning_effort": "low"}),
        ("xhigh", LEVEL, {"reasoning_effort": "high"}),
        ("none", {"enable_thinking", *LEVEL}, {"enable_thinking": False}),
        ("high", {"enable_thinking", *LEVEL}, {"enable_thinking": True, "reasoning_effort": "high"}),
        ("medium", set(), {}),
    ],
)
def test_effort_becomes_variables(effort: str, known: set[str], found: dict[str, object]) -> None:
    assert effort_variables(effort, known, reasons=True) == found


@pytest.mark.parametrize(
    ("effort", "known", "reasons"),
    [
        ("none", set(), True),
        ("none", LEVEL, True),
        ("minimal", set(), True),
        ("high", set(), True),
        ("low", set(), False),
    ],
)
def test_what_a_template_cannot_be_told_is_refused(effort: str, known: set[str], reasons: bool) -> None:
    """Guards against an effort that is dropped in silence."""
    with pytest.raises(BadRequest, match=effort) as raised:
        effort_variables(effort, known, reasons=reasons)
    assert raised.value.param == "reasoning_effort"


def test_a_model_that_does_not_reason_is_at_none_already() -> None:
    assert effort_variables("none", set(), reasons=False) == effort_variables("medium", set(), reasons=False) == {}


def test_variables_are_read_before_they_are_set() -> None:
    """Guards against a template's own variable that is taken for a switch."""
    default = "{% if not thinking is defined %}{% set thinking = false %}{% endif %}{{ thinking }}"
    assert "thinking" in variables_of(default)
    assert "thinking" not in variables_of("{% set thinking = messages[0].thinking %}\n{{ thinking }}")
    assert variables_of("{{ a" + ".b" * 5000 + " }}") == frozenset()
