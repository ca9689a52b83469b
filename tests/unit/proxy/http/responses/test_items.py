"""Input items as messages of a chat.

Guards against turns that templates cannot render (two messages for one answer, several system messages), and history
that is lost in silence.
"""

from __future__ import annotations

from typing import Any

import pytest

from baton.node.errors import BadRequest
from baton.proxy.http.messages import conversation
from baton.proxy.http.responses.items import chat_messages

CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "5"}
REASONING = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
ANSWER = {
    "type": "message",
    "id": "msg_1",
    "status": "completed",
    "role": "assistant",
    "content": [{"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}],
}
SHOWN_CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "input_text", "text": text}]}


def rendered(given: Any, instructions: str | None = None) -> list[dict[str, Any]]:
    return [dict(message) for message in conversation(chat_messages(instructions, given))]


def test_text_is_a_message_of_the_user() -> None:
    assert rendered("Hi") == [{"role": "user", "content": "Hi"}]
    assert rendered([{"type": "message", "role": "user", "content": "Hi"}]) == rendered([user("Hi")]) == rendered("Hi")


def test_one_answer_is_one_message() -> None:
    reasoning = {"reasoning": "hm", "reasoning_content": "hm"}
    assert rendered([user("x"), REASONING, ANSWER, CALL, {**CALL, "call_id": "c2"}, OUTPUT, ANSWER]) == [
        {"role": "user", "content": "x"},
        {
            "role": "assistant",
            "content": "I look.",
            "tool_calls": [SHOWN_CALL, {**SHOWN_CALL, "id": "c2"}],
            **reasoning,
        },
        {"role": "tool", "content": "5", "tool_call_id": "c1"},
        {"role": "assistant", "content": "I look."},
    ]


@pytest.mark.parametrize("items", [[ANSWER, ANSWER], [ANSWER, REASONING, ANSWER], [CALL, REASONING, ANSWER]])
def test_what_follows_an_answer_is_another_one(items: list[dict[str, Any]]) -> None:
    assert [message["role"] for message in rendered(items)] == ["assistant", "assistant"]


def test_instructions_and_what_the_developer_says_first_are_one_system_message() -> None:
    """Guards templates that allow one system message, at the beginning; Codex sends instructions and such messages."""
    developer = {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "b"}]}
    assert rendered([developer, user("x"), {**developer, "role": "system"}], "a") == [
        {"role": "system", "content": "a\n\nb"},
        {"role": "user", "content": "x"},
        {"role": "system", "content": "b"},
    ]


def test_reasoning_that_cannot_be_read_is_left_out() -> None:
    hidden = {"type": "reasoning", "summary": [], "content": None, "encrypted_content": "gAAA"}
    assert rendered([user("x"), hidden, ANSWER])[1] == {"role": "assistant", "content": "I look."}
    summary = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "so"}], "encrypted_content": "gAAA"}
    assert rendered([summary, ANSWER])[0]["reasoning_content"] == "so"


def test_custom_calls_and_namespaces_have_the_names_that_the_model_knows() -> None:
    custom = {"type": "custom_tool_call", "call_id": "c", "name": "apply_patch", "input": "*** Begin"}
    spaced = {**CALL, "namespace": "mcp__maps__", "name": "find"}
    output = {"type": "custom_tool_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "done"}]}
    answer, result = rendered([custom, spaced, output])
    assert [call["function"] for call in answer["tool_calls"]] == [
        {"name": "apply_patch", "arguments": {"input": "*** Begin"}},
        {"name": "mcp__maps__find", "arguments": {"a": 1}},
    ]
    assert result == {"role": "tool", "tool_call_id": "c", "content": "done"}


@pytest.mark.parametrize(
    ("item", "param"),
    [
        ({"type": "item_reference", "id": "msg_1"}, "input.0.type"),
        ({"type": "web_search_call", "id": "ws_1"}, "input.0.type"),
        ({"type": 5}, "input.0.type"),
        ({"content": "x"}, "input.0.type"),
        ({"role": "tool", "content": "x"}, "input.0.role"),
        ({"role": "user"}, "input.0.content"),
        ({"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}, "input.0.content"),
        ({"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}, "input.0.content"),
        ({"type": "function_call", "name": "f", "arguments": "{}"}, "input.0.call_id"),
        ({**OUTPUT, "output": [{"type": "input_image", "image_url": "x"}]}, "input.0.output"),
        ({**REASONING, "content": [{"type": "reasoning_text"}]}, "input.0.content.0.text"),
    ],
)
def test_bad_items_are_refused(item: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        rendered([item])
    assert caught.value.param == param


def test_an_empty_conversation_is_refused() -> None:
    with pytest.raises(BadRequest, match="input is empty"):
        rendered([])
