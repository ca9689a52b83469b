"""Bodies of /v1/responses: what is read as a chat's request is, what is refused and how.

Guards against parameters that are dropped in silence, and tools that break agents because they are refused.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from baton.node.errors import BadRequest
from baton.proxy.http.responses.request import read_responses
from baton.proxy.http.schema import ParsedRequest, StopRule, Truncation, read_chat

BODY: dict[str, Any] = {"model": "m", "input": "x"}
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
FUNCTION = {"name": "f", "description": "d", "parameters": SCHEMA}
TOOL = {"type": "function", **FUNCTION}
CHAT_TOOLS = [{"type": "function", "function": FUNCTION}]
CHOSEN, HOSTED = {"type": "function", "name": "f"}, {"type": "web_search"}


def read(**fields: Any) -> ParsedRequest:
    return read_responses(json.dumps({**BODY, **fields}).encode())[0]


def chat(**fields: Any) -> ParsedRequest:
    return read_chat(json.dumps({**CHAT, **fields}).encode())


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"max_output_tokens": 5}, {"max_tokens": 5}),
        ({"tools": [TOOL]}, {"tools": CHAT_TOOLS}),
        (
            {"tools": [{**TOOL, "strict": False}]},
            {"tools": [{"type": "function", "function": {**FUNCTION, "strict": False}}]},
        ),
        ({"tools": [TOOL], "tool_choice": "required"}, {"tools": CHAT_TOOLS, "tool_choice": "required"}),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "name": "f"}},
            {"tools": CHAT_TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}},
        ),
        (
            {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [CHOSEN, HOSTED]}},
            {"tools": CHAT_TOOLS, "tool_choice": "required"},
        ),
        ({"tools": [TOOL], "parallel_tool_calls": False}, {"tools": CHAT_TOOLS, "parallel_tool_calls": False}),
        ({"tools": [TOOL], "tool_choice": "none"}, {"tools": CHAT_TOOLS, "tool_choice": "none"}),
        ({"temperature": 0.5, "top_p": 0.1, "seed": 5, "top_k": 3, "stop": ["a"], "min_tokens": 2}, None),
        ({"user": "u", "prompt_cache_key": "k", "cache_salt": "s", "priority": 3}, None),
        ({"chat_template_kwargs": {"a": 1}, "stream": True, "skip_special_tokens": False}, None),
        (
            {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
            {"logprobs": True, "top_logprobs": 2},
        ),
        ({"structured_outputs": {"regex": "a+"}}, None),
        ({"text": {"format": {"type": "text"}, "verbosity": "medium"}}, {}),
        ({"metadata": {"a": "b"}, "store": True, "service_tier": "auto", "max_tool_calls": 3}, {}),
        ({"include": ["reasoning.encrypted_content"], "background": False, "n": 1}, {}),
        ({"reasoning": {"effort": "low", "summary": "auto"}}, {"reasoning_effort": "low"}),
        ({"truncation": "disabled", "previous_response_id": None, "safety_identifier": "s"}, {}),
    ],
)
def test_it_is_read_as_a_chat(ours: dict[str, Any], theirs: dict[str, Any] | None) -> None:
    """A null of the second column: the same names as in a chat."""
    given, expected = read(**ours), chat(**(ours if theirs is None else theirs))
    assert given.prompt_param == "input" and expected.prompt_param == "messages"
    for name in ParsedRequest.__slots__:
        if name not in ("prompt_param", "tools", "render"):
            assert getattr(given, name) == getattr(expected, name), name
    assert replace(given.render, effort_param="") == replace(expected.render, effort_param="")
    assert given.tools is not None and expected.tools is not None
    assert replace(given.tools, params={}) == replace(expected.tools, params={})


def test_truncation_keeps_the_end() -> None:
    assert read(truncation="auto").truncation == Truncation(None, keep_first=False)
    assert read(stop="a").stop == StopRule(("a",), include=False)


def test_forms_of_text() -> None:
    form: dict[str, Any] = {"type": "json_schema", "name": "n", "schema": SCHEMA}
    for strict, lenient in ((None, False), (True, False), (False, True)):
        grammar = read(text={"format": {**form, "strict": strict}}).grammar
        assert grammar is not None and json.loads(grammar.text) == SCHEMA
        assert (grammar.param, grammar.lenient) == ("text.format.schema", lenient)
    json_object = read(text={"format": {"type": "json_object"}}).grammar
    assert json_object is not None and json_object.param == "text.format"


@pytest.mark.parametrize("kind", ["web_search", "local_shell", "shell", "image_generation", "mcp", "new_one"])
def test_tools_of_other_servers_are_left_out_and_named(kind: str) -> None:
    request = read(tools=[{"type": kind, "server_label": "x"}, TOOL], tool_choice="auto")
    assert request.unknown == (f"tools.{kind}",)
    assert request.tools is not None and set(request.tools.schemas) == {"f"}


def test_names_of_tools() -> None:
    custom = {"type": "custom", "name": "patch", "format": {"type": "grammar", "syntax": "lark", "definition": "start"}}
    group = {"type": "namespace", "name": "crm", "description": "d", "tools": [TOOL, {**custom, "name": "p"}]}
    request = read(tools=[TOOL, custom, group, {**group, "name": "mcp__x__"}])
    assert request.tools is not None
    assert request.tools.params["crm__p"] == "tools.2.tools.1.parameters"
    assert list(request.tools.schemas) == ["f", "patch", "crm__f", "crm__p", "mcp__x__f", "mcp__x__p"]
    parameters = request.tools.schemas["patch"]
    assert parameters["required"] == ["input"] and "start" in parameters["properties"]["input"]["description"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": [5]}, "input"),
        ({"input": []}, "input"),
        ({"model": ""}, "model"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 3, "min_tokens": 4}, "min_tokens"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"context_management": [{"type": "compaction"}]}, "context_management"),
        ({"include": ["web_search_call.action.sources"]}, "include.0"),
        ({"truncation": "middle"}, "truncation"),
        ({"messages": CHAT["messages"]}, "messages"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"temprature": 1}, "temprature"),
        ({"reasoning": {"effort": "hard"}}, "reasoning.effort"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "schema": "x"}}}, "text.format.schema"),
        (
            {"text": {"format": {"type": "json_object"}}, "structured_outputs": {"regex": "a"}},
            "structured_outputs.regex",
        ),
        ({"text": {"format": {"type": "json_object"}}, "ignore_eos": True}, "ignore_eos"),
        ({"tools": [{"name": "f"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": FUNCTION}]}, "tools.0.name"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools.0.name"),
        ({"tools": [{**TOOL, "parameters": "x"}]}, "tools.0.parameters"),
        ({"tools": [{**TOOL, "parameters": {"type": "string"}}]}, "tools.0.parameters"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "tools": [HOSTED]}}, "tool_choice.tools"),
        ({"tools": [TOOL, TOOL]}, "tools.1.name"),
        ({"tools": [{**TOOL, "output_schema": "x" * (1 << 20)}]}, "tools"),
        ({"metadata": {"a": "x" * 513}}, "metadata"),
        ({"metadata": {f"{n}": "x" for n in range(17)}}, "metadata"),
        ({"tools": [{"type": "namespace", "name": "n", "tools": [TOOL, TOOL]}]}, "tools.0.tools.1.name"),
        ({"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "function"}]}]}, "tools.0.tools.0.name"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice.name"),
        ({"tools": [{"type": "web_search"}], "tool_choice": {"type": "web_search"}}, "tool_choice.type"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "x", "tools": []}}, "tool_choice.mode"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "tools": 5}}, "tool_choice.tools"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        read(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)
