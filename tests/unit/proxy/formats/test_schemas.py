"""Schemas of a function's parameters whose objects take no other properties than those that they list."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from baton.proxy.formats.schemas import closed

TEXT = {"type": "string"}
OPEN = {"type": "object", "properties": {"a": TEXT}, "required": ["a"]}
CLOSED = {**OPEN, "additionalProperties": False}


@pytest.mark.parametrize(
    ("given", "made"),
    [
        (OPEN, CLOSED),
        ({"properties": {"a": OPEN}}, {"properties": {"a": CLOSED}, "additionalProperties": False}),
        ({"items": OPEN}, {"items": CLOSED}),
        ({"prefixItems": [OPEN, True]}, {"prefixItems": [CLOSED, True]}),
        ({"additionalProperties": OPEN}, {"additionalProperties": CLOSED}),
        ({"anyOf": [OPEN, {"type": "null"}]}, {"anyOf": [CLOSED, {"type": "null"}]}),
        ({"$ref": "#/$defs/x", "$defs": {"x": OPEN}}, {"$ref": "#/$defs/x", "$defs": {"x": CLOSED}}),
    ],
)
def test_objects_that_list_properties_are_closed(given: Any, made: Any) -> None:
    """Guards callers of `f(**arguments)`: a model may make up arguments where the schema does not forbid it."""
    before = copy.deepcopy(given)
    assert closed(given) == made and given == before


@pytest.mark.parametrize(
    "given",
    [
        True,
        {"type": "object"},
        {**OPEN, "additionalProperties": True},
        {**OPEN, "patternProperties": {"^x": TEXT}},
        {**OPEN, "required": ["b"]},
        {**OPEN, "anyOf": [{"required": ["b"]}, {"properties": {"b": TEXT}}]},
        {"allOf": [OPEN, {"properties": {"b": TEXT}}]},
        {"allOf": [{"$ref": "#/$defs/x"}, {"properties": {"b": TEXT}}], "$defs": {"x": OPEN}},
        {"$ref": "#/$defs/x", "properties": {"b": TEXT}, "$defs": {"x": OPEN}},
    ],
)
def test_objects_of_several_parts_and_open_ones_stay(given: Any) -> None:
    """Guards schemas that nothing would fit if a part forbade what another one needs."""
    assert closed(given) == given
