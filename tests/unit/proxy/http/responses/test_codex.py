"""A turn of Codex CLI with its tools, and the next one with their results, at the level of requests and events.

Codex takes items from `output_item.done`, shows deltas of items that were added, and ends at `response.completed`; it
sends items back without their ids, and reasoning without its text. Servers broke it by refusing types of tools.
"""

from __future__ import annotations

import json
from typing import Any

import httpx

from baton.tests.unit.proxy.http.responses.conftest import Answers
from baton.tests.unit.proxy.http.responses.event_rules import events_of, final_response

PATCH = "*** Begin Patch\n*** Update File: a.py\n@@\n-x = 1\n+x = 2\n*** End Patch\n"
GRAMMAR = 'start: begin_patch hunk+ end_patch\nbegin_patch: "*** Begin Patch" LF\n'
EXEC = {
    "type": "function",
    "name": "exec_command",
    "description": "Runs a command in a PTY.",
    "strict": False,
    "parameters": {"type": "object", "properties": {"cmd": {"type": "string"}}, "required": ["cmd"]},
}
TOOLS: list[dict[str, Any]] = [
    EXEC,
    {
        "type": "custom",
        "name": "apply_patch",
        "description": "Use the tool to edit files.",
        "format": {"type": "grammar", "syntax": "lark", "definition": GRAMMAR},
    },
    {"type": "local_shell"},
    {"type": "web_search", "external_web_access": False},
    {
        "type": "namespace",
        "name": "mcp__docs__",
        "description": "Tools of a server.",
        "tools": [{**EXEC, "name": "search", "defer_loading": True}],
    },
]
REQUEST: dict[str, Any] = {
    "model": "demo",
    "instructions": "You are a coding agent.",
    "tools": TOOLS,
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "reasoning": None,
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "0199-aa",
    "client_metadata": {"x-codex-installation-id": "1"},
}
FIRST = [
    {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "<permissions>"}]},
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "<environment_context>"}]},
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Set x to 2."}]},
]


def call(name: str, arguments: dict[str, Any]) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def kept(item: dict[str, Any]) -> dict[str, Any]:
    """An item as Codex sends it back."""
    fields = {
        "reasoning": ("type", "summary"),
        "message": ("type", "role", "content"),
        "function_call": ("type", "name", "namespace", "arguments", "call_id"),
        "custom_tool_call": ("type", "status", "call_id", "name", "input"),
    }[item["type"]]
    made = {name: item[name] for name in fields if name in item}
    if item["type"] == "message":
        made["content"] = [{"type": "output_text", "text": part["text"]} for part in item["content"]]
    return made | ({"encrypted_content": None} if item["type"] == "reasoning" else {})


async def turn(client: httpx.AsyncClient, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items of the answer, as Codex finds them in the stream."""
    answer = await client.post("/v1/responses", json={**REQUEST, "input": items})
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream"), answer.text
    events = events_of(answer.text)
    assert final_response(events)["status"] == "completed"
    added = {event["item"]["id"] for event in events if event["type"] == "response.output_item.added"}
    assert all(event["item_id"] in added for event in events if "delta" in event)
    return [event["item"] for event in events if event["type"] == "response.output_item.done"]


async def test_two_turns(client: httpx.AsyncClient, answers: Answers) -> None:
    answers.text = "\n".join(
        (
            "<think>\nI look.\n</think>\n\nI look first.",
            call("exec_command", {"cmd": "cat a.py"}),
            call("mcp__docs__search", {"cmd": "x"}),
            call("apply_patch", {"input": PATCH}),
        )
    )
    items = await turn(client, FIRST)
    assert [item["type"] for item in items] == [
        *("reasoning", "message", "function_call", "function_call", "custom_tool_call"),
    ]
    assert items[2]["arguments"] == '{"cmd": "cat a.py"}' and "namespace" not in items[2]
    assert (items[3]["namespace"], items[3]["name"]) == ("mcp__docs__", "search")
    assert items[4]["input"] == PATCH
    results = [
        {"type": "function_call_output", "call_id": items[2]["call_id"], "output": "x = 1"},
        {"type": "function_call_output", "call_id": items[3]["call_id"], "output": "nothing"},
        {"type": "custom_tool_call_output", "call_id": items[4]["call_id"], "output": "Success"},
    ]
    answers.text = "Done."
    (last,) = await turn(client, [*FIRST, *map(kept, items), *results])
    assert last["content"][0]["text"] == "Done."
    first, second = answers.prompts
    assert second.startswith(first.rstrip().removesuffix("]")), "the prefix of the first turn, for the cache"
    messages = json.loads(second.splitlines()[-1])
    assert [message["role"] for message in messages] == ["system", "user", "user", "assistant", *["tool"] * 3]
    assert messages[0]["content"] == "You are a coding agent.\n\n<permissions>"
    functions = [made["function"] for made in messages[3]["tool_calls"]]
    assert [function["name"] for function in functions] == ["exec_command", "mcp__docs__search", "apply_patch"]
    assert functions[2]["arguments"] == {"input": PATCH}
    assert [message["content"] for message in messages[4:]] == ["x = 1", "nothing", "Success"]
    declared = [json.loads(line)["function"]["name"] for line in second.splitlines()[:3]]
    assert declared == ["exec_command", "apply_patch", "mcp__docs__search"]
