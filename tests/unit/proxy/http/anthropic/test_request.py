"""Bodies of the Messages API: the same prompt as a chat of the same conversation, and errors that name the field."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from baton.node.errors import BadRequest
from baton.proxy.http.anthropic.request import read_count, read_messages
from baton.proxy.http.schema import ParsedRequest, read_chat

USER = {"role": "user", "content": "Hi"}
BODY: dict[str, Any] = {"model": "demo", "max_tokens": 40, "messages": [USER]}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"name": "get_weather", "description": "Of a city.", "input_schema": SCHEMA}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Rome", "a": 1}}
BILLING = "x-anthropic-billing-header: cc_version=2.1.0; cch=0a1b2;"


def read(**more: Any) -> ParsedRequest:
    parsed, _ = read_messages(json.dumps({**BODY, **more}).encode())
    return parsed


def chat(messages: list[dict[str, Any]], **more: Any) -> ParsedRequest:
    return read_chat(json.dumps({"model": "demo", "max_tokens": 40, "messages": messages, **more}).encode())


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value, "cache_control": {"type": "ephemeral"}}


def test_a_conversation_is_that_of_a_chat() -> None:
    """Guards against two prompts of one conversation: system, reasoning, calls, several results, text after them."""
    turns = [
        {"role": "user", "content": [text("What is"), text("the weather?")]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Look.", "signature": "x"},
                {"type": "redacted_thinking", "data": "x"},
                text("I look."),
                CALL,
                {**CALL, "id": "toolu_2"},
            ],
        },
        {
            "role": "user",
            "content": [
                text("Go on."),
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [text("20"), text("C")]},
                {"type": "tool_result", "tool_use_id": "toolu_2", "content": "no city", "is_error": True},
            ],
        },
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "So?"},
    ]
    calls = [
        {"id": each, "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome", "a": 1}'}}
        for each in ("toolu_1", "toolu_2")
    ]
    as_chat = [
        {"role": "system", "content": "You help.\nAlways."},
        {"role": "user", "content": "What is\nthe weather?"},
        {"role": "assistant", "content": "I look.", "tool_calls": calls, "reasoning_content": "Look."},
        {"role": "tool", "tool_call_id": "toolu_1", "content": "20\nC"},
        {"role": "tool", "tool_call_id": "toolu_2", "content": "Error: no city"},
        {"role": "user", "content": "Go on."},
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "So?"},
    ]
    function = {"name": "get_weather", "description": "Of a city.", "parameters": SCHEMA}
    found = read(system=[text(BILLING), text("You help."), text("Always.")], messages=turns, tools=[TOOL])
    wanted = chat(as_chat, tools=[{"type": "function", "function": function}])
    assert wanted.tools is not None
    in_place = replace(wanted.tools, params={"get_weather": "tools.0.input_schema"})
    assert found == replace(wanted, tools=in_place, ends_with_context=True)


@pytest.mark.parametrize(
    ("system", "kept"),
    [
        (BILLING, None),
        ([text(BILLING)], None),
        ([], None),
        (f"{BILLING}\n\nBe brief.", "Be brief."),
        ([text(BILLING), text("Be brief.")], "Be brief."),
        ("Be brief.", "Be brief."),
    ],
)
def test_the_billing_header_is_no_part_of_the_prompt(system: Any, kept: str | None) -> None:
    """Guards against a hash in front of each prompt, with which no prefix is found in a cache."""
    wanted = [{"role": "system", "content": kept}] if kept else []
    assert list(read(system=system).messages) == [*wanted, USER]


def test_neighbouring_turns_are_one() -> None:
    """Guards against templates that refuse two messages of one role, which this API allows; in linear time."""
    turns = [USER, {"role": "user", "content": [text("you")]}] * 5000
    (message,) = read(messages=turns).messages
    assert message == {"role": "user", "content": "\n".join(["Hi", "you"] * 5000)}


@pytest.mark.parametrize(
    ("content", "is_error", "wanted"),
    [
        (None, None, ""),
        (None, True, "Error: "),
        ("<tool_use_error>Error: no file</tool_use_error>", True, "<tool_use_error>Error: no file</tool_use_error>"),
        ([{"type": "tool_reference", "tool_name": "grep"}], False, "grep"),
    ],
)
def test_results(content: Any, is_error: bool | None, wanted: str) -> None:
    """Guards against a failure that reaches the model as a result."""
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": content, "is_error": is_error}
    turns = [USER, {"role": "assistant", "content": [CALL]}, {"role": "user", "content": [result]}]
    assert read(messages=turns).messages[-1] == {"role": "tool", "tool_call_id": "toolu_1", "content": wanted}


@pytest.mark.parametrize(
    "turns", [[USER, {"role": "assistant", "content": "So"}], [{"role": "assistant", "content": "So"}]]
)
def test_a_last_message_of_the_assistant_is_continued(turns: list[dict[str, Any]]) -> None:
    """Guards against an answer that begins anew where the client began it."""
    render = read(messages=turns).render
    assert render.continue_final_message and not render.add_generation_prompt


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ({}, {}),
        ({"thinking": {"type": "disabled"}}, {"enable_thinking": False, "thinking": False}),
        ({"thinking": {"type": "adaptive", "display": "summarized"}}, {"enable_thinking": True, "thinking": True}),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 1025},
            {"enable_thinking": True, "thinking": True},
        ),
        ({"output_config": {"effort": "max"}}, {"reasoning_effort": "high"}),
        ({"output_config": {"effort": "low"}}, {"reasoning_effort": "low"}),
        (
            {"thinking": {"type": "disabled"}, "chat_template_kwargs": {"thinking": True, "level": 2}},
            {"enable_thinking": False, "thinking": True, "level": 2},
        ),
    ],
)
def test_thinking_is_switched_in_the_template(more: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Guards against a switch that is lost."""
    assert read(**more).render.variables == wanted


@pytest.mark.parametrize(("budget", "max_tokens", "bound"), [(1024, 2000, 1024), (1999, 2000, None)])
def test_thinking_is_bounded(budget: int, max_tokens: int, bound: int | None) -> None:
    """Guards against a bound that is lost, and against the cost of one that leaves no answer, which agents send."""
    thinking = {"type": "enabled", "budget_tokens": budget}
    assert read(thinking=thinking, max_tokens=max_tokens).max_reasoning == bound
    assert read(thinking={"type": "adaptive"}).max_reasoning is None


def test_parameters_reach_the_request() -> None:
    """Guards against a parameter that is read and lost."""
    found = read(
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        seed=3,
        stop_sequences=["a", "b"],
        stream=True,
        cache_salt="s",
        priority=2,
        metadata={"user_id": "u", "x": 1},
        output_config={"effort": None, "format": {"type": "json_schema", "schema": SCHEMA}},
        cache_control={"type": "ephemeral"},
        betas=["x"],
        context_management={"edits": []},
        service_tier="auto",
        mcp_servers=[],
        container=None,
        surprise=1,
    )
    sampling = found.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.5, 0.9, 7, 3)
    assert found.stop.strings == ("a", "b") and not found.stop.include and found.stream
    assert (found.cache_salt, found.priority, found.max_tokens) == ("s", -2, 40)
    assert found.unknown == ("surprise",) and len(found.session_key) == 16
    assert found.grammar is not None and json.loads(found.grammar.text) == SCHEMA
    assert read(output_format={"type": "json_schema", "schema": SCHEMA}).grammar is not None


def test_counting_needs_no_max_tokens() -> None:
    """Guards against a count of another prompt than the request's."""
    body = {key: value for key, value in BODY.items() if key != "max_tokens"}
    assert read_count(json.dumps(body).encode()).messages == read().messages


@pytest.mark.parametrize(
    ("choice", "names", "max_calls"),
    [
        (None, {"get_weather"}, None),
        ({"type": "auto"}, {"get_weather"}, None),
        ({"type": "auto", "disable_parallel_tool_use": True}, {"get_weather"}, 1),
        ({"type": "none"}, set(), None),
        ({"type": "any"}, {"get_weather"}, None),
        ({"type": "any", "disable_parallel_tool_use": True}, {"get_weather"}, 1),
        ({"type": "tool", "name": "get_weather"}, {"get_weather"}, 1),
    ],
)
def test_tools(choice: Any, names: set[str], max_calls: int | None) -> None:
    """Guards against tools of Anthropic's servers that a model without them would call, and that are lost unseen."""
    hosted = {"type": "web_search_20250305", "name": "web_search", "max_uses": 5}
    found = read(tools=[TOOL, hosted], tool_choice=choice)
    assert found.tools is not None and set(found.tools.schemas) == names and found.tools.max_calls == max_calls
    assert found.tools.forced == (choice is not None and choice["type"] in ("any", "tool"))
    assert found.unknown == ("tools.web_search",)


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{**USER, "name": "x"}]}, "messages.0.name"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [CALL]}]}, "messages.0.content.0"),
    ({"messages": [{"role": "system", "content": [CALL]}]}, "messages.0.content.0"),
    ({"messages": [{"role": "system", "content": BILLING}]}, "messages"),
    ({"messages": [USER, {"role": "assistant", "content": [CALL]}]}, "messages"),
    (
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1"}]}]},
        "messages.0.content.0",
    ),
    (
        {
            "messages": [
                {"role": "assistant", "content": [CALL]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": [IMAGE]}]},
            ]
        },
        "messages.1.content",
    ),
    ({"messages": [{"role": "assistant", "content": [{**CALL, "input": "{}"}]}]}, "messages.0.content"),
    ({"system": 5}, "system"),
    ({"system": [IMAGE]}, "system"),
    ({"temperature": 1.5}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"top_p": 2}, "top_p"),
    ({"stop_sequences": "a"}, "stop_sequences"),
    ({"stop_sequences": [""]}, "stop_sequences"),
    ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1023}, "max_tokens": 2000}, "thinking.budget_tokens"),
    ({"thinking": {"type": "enabled", "budget_tokens": 2000}, "max_tokens": 2000}, "thinking.budget_tokens"),
    ({"thinking": {"type": "perhaps"}}, "thinking.type"),
    ({"tools": [{"name": "f"}]}, "tools.0.input_schema"),
    ({"tools": [{"name": "f g", "input_schema": {}}]}, "tools.0.name"),
    ({"tools": [{"input_schema": {}}]}, "tools.0.name"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"tool_choice": {"type": "tool", "name": "f"}, "tools": [TOOL]}, "tool_choice.name"),
    (
        {"tool_choice": {"type": "tool", "name": "bash"}, "tools": [{"type": "bash_20250124", "name": "bash"}]},
        "tool_choice.name",
    ),
    ({"tool_choice": "any", "tools": [TOOL]}, "tool_choice"),
    ({"output_config": {"format": {"type": "text"}}}, "output_config.format.type"),
    ({"output_config": {"effort": "huge"}}, "output_config.effort"),
    ({"tools": [TOOL, TOOL]}, "tools.1.name"),
    ({"tools": [{"name": "f", "input_schema": {"type": "array"}}]}, "tools.0.input_schema"),
    ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
    ({"stop": ["a"]}, "stop"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"container": "x"}, "container"),
    ({"temprature": 1.0}, "temprature"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
)


@pytest.mark.parametrize(("more", "param"), REFUSED, ids=[json.dumps(more)[:60] for more, _ in REFUSED])
def test_bad_bodies_name_what_is_wrong(more: dict[str, Any], param: str) -> None:
    """Guards against a 500, and against input that is lost in silence."""
    with pytest.raises(BadRequest) as error:
        read(**more)
    assert (error.value.status, error.value.param) == (400, param) and len(str(error.value)) < 400
