"""The requests of an agent, Claude Code, in the shapes in which it sends them: counting, a turn that calls a tool, and
the turn with its result, each streamed."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from baton.proxy.interface import AppSettings
from baton.testing.fake_engine import FakeEngine
from baton.tests.unit.proxy.http.anthropic.conftest import Scripted
from baton.tests.unit.proxy.http.anthropic.stream_reader import read_stream

EPHEMERAL = {"cache_control": {"type": "ephemeral"}}
HEADERS = {
    "anthropic-version": "2023-06-01",
    "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14,context-management-2025-06-27",
    "anthropic-dangerous-direct-browser-access": "true",
    "authorization": "Bearer secret",
    "user-agent": "claude-cli/2.1.0 (external, cli)",
    "x-app": "cli",
    "x-stainless-lang": "js",
    "x-stainless-retry-count": "0",
    "x-stainless-timeout": "600",
}
NAMES = ("Bash", "Glob", "Grep", "Read", "Edit", "Write", "WebFetch", "TodoWrite", "mcp__files__list_directory_of_all")
TOOLS: list[dict[str, Any]] = [
    {
        "name": name,
        "description": f"Runs {name}. " + "It says at length what it does and when to use it. " * 4,
        "input_schema": {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "type": "object",
            "properties": {"path": {"type": "string", "description": "Where."}, "limit": {"type": "number"}},
            "required": ["path"],
            "additionalProperties": False,
        },
    }
    for name in NAMES
]
ANSWER = (
    "The user asks for a file.\n</think>\n\nI will read it.\n"
    '<tool_call>\n{"name": "Read", "arguments": {"path": "/tmp/a.txt"}}\n</tool_call>'
)


@pytest.fixture
def app_settings() -> AppSettings:
    return AppSettings(api_keys=("secret",))


def body(turn: int, messages: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a request of the main loop; the first text differs in each."""
    return {
        "model": "demo",
        "messages": messages,
        "system": [
            {
                "type": "text",
                "text": f"x-anthropic-billing-header: cc_version=2.1.0.a{turn}; cc_entrypoint=cli; cch={turn}f3;",
            },
            {"type": "text", "text": "You are Claude Code, Anthropic's official CLI for Claude.", **EPHEMERAL},
            {"type": "text", "text": "\nYou are an interactive agent.\n# Tone\nBe concise.\n" * 8, **EPHEMERAL},
        ],
        "tools": [*TOOLS[:-1], {**TOOLS[-1], **EPHEMERAL}],
        "metadata": {"user_id": "user_1f_account__session_0b6a"},
        "max_tokens": 32_000,
        "thinking": {"type": "enabled", "budget_tokens": 31_999},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "stream": True,
    }


FIRST = {
    "role": "user",
    "content": [
        {"type": "text", "text": "<system-reminder>\nThe date is today.\n</system-reminder>"},
        {"type": "text", "text": "Read /tmp/a.txt", **EPHEMERAL},
    ],
}


async def send(client: httpx.AsyncClient, path: str, sent: dict[str, Any]) -> httpx.Response:
    answer = await client.post(f"{path}?beta=true", json=sent, headers=HEADERS)
    assert answer.status_code == 200, answer.text
    assert "x-baton-ignored-parameters" not in answer.headers
    return answer


async def test_a_turn_with_a_tool_and_the_turn_after_it(
    client: httpx.AsyncClient, engine: FakeEngine, scripted: Scripted
) -> None:
    """Guards against a request that is refused, events that end the agent, and a second turn that is computed anew."""
    engine.model_len = 40_000
    scripted.text = ANSWER
    count = {name: body(0, [FIRST])[name] for name in ("model", "messages", "system", "tools", "thinking")}
    counted = await send(client, "/v1/messages/count_tokens", count)
    message = read_stream((await send(client, "/v1/messages", body(1, [FIRST]))).text)
    assert [block["type"] for block in message["content"]] == ["thinking", "text", "tool_use"]
    assert message["stop_reason"] == "tool_use" and message["content"][2]["input"] == {"path": "/tmp/a.txt"}
    assert counted.json() == {"input_tokens": message["usage"]["input_tokens"]}
    result = {
        "role": "user",
        "content": [
            {
                "tool_use_id": message["content"][2]["id"],
                "type": "tool_result",
                "content": "     1\tOnce upon a time",
                **EPHEMERAL,
            }
        ],
    }
    answered = {"role": message["role"], "content": message["content"]}
    scripted.text = "I know.\n</think>\n\nIt says: Once upon a time."
    second = read_stream((await send(client, "/v1/messages", body(2, [FIRST, answered, result]))).text)
    assert second["stop_reason"] == "end_turn" and second["content"][-1]["text"] == "It says: Once upon a time."
    prompts = [call.prompt_ids for call in engine.calls]
    same = [first == second for first, second in zip(*prompts, strict=False)]
    assert [*same, False].index(False) >= 0.99 * len(prompts[0])
    assert len({call.generation.session_key for call in engine.calls}) == 1


async def test_small_requests_beside_the_main_loop(
    client: httpx.AsyncClient, scripted: Scripted, engine: FakeEngine
) -> None:
    """Guards the check of the quota, a title as JSON, and an answer that the client has begun."""
    await send(
        client, "/v1/messages", {"model": "demo", "max_tokens": 1, "messages": [{"role": "user", "content": "quota"}]}
    )
    schema = {
        "type": "object",
        "properties": {"title": {"type": "string"}},
        "required": ["title"],
        "additionalProperties": False,
    }
    title = {
        "model": "demo",
        "max_tokens": 512,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Write a title."}]}],
        "system": [{"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.0; cch=00000;"}],
        "tools": [],
        "temperature": 1,
        "output_config": {"format": {"type": "json_schema", "schema": schema}},
        "thinking": {"type": "disabled"},
        "stream": True,
    }
    scripted.text = json.dumps({"title": "A fox"})
    read_stream((await send(client, "/v1/messages", title)).text)
    assert engine.calls[-1].sampling.grammar is not None
    begun = {**title, "messages": [*title["messages"], {"role": "assistant", "content": "{"}], "output_config": {}}
    message = read_stream((await send(client, "/v1/messages", begun)).text)
    assert message["content"] == [{"type": "text", "text": scripted.text}]
