"""`/v1/messages` and its count of tokens, over an engine that replays scripts: a chat's answers in another shape."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from baton.node.errors import BatonError, DeadlineExceeded, InvariantBroken, Overloaded, PeerLost
from baton.proxy.interface import AppSettings
from baton.testing.fake_engine import FakeEngine
from baton.tests.unit.proxy.http.anthropic.conftest import Scripted
from baton.tests.unit.proxy.http.anthropic.stream_reader import events_of, read_stream

PATH = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
USER = {"role": "user", "content": "Hi"}
BODY: dict[str, Any] = {"model": "demo", "max_tokens": 400, "messages": [USER], "seed": 3}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'


async def ask(client: httpx.AsyncClient, **more: Any) -> dict[str, Any]:
    """The answer, after a check that its stream builds the same."""
    whole = await client.post(PATH, json={**BODY, **more})
    assert whole.status_code == 200, whole.text
    streamed = await client.post(f"{PATH}?beta=true", json={**BODY, **more, "stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    message, built = whole.json(), read_stream(streamed.text)
    for each in (message, built):
        assert each.pop("id").startswith("msg_")
        for block in each["content"]:
            assert block["type"] != "tool_use" or block.pop("id")
    assert message == built
    return message


@pytest.mark.parametrize(
    ("answer", "finish", "more"),
    [
        ("Once upon a time.", "stop", {}),
        ("Once upon a time.", "length", {}),
        ("<think>\nHmm.\n</think>\n\nYes.", "stop", {}),
        ("Hmm.\n</think>\n\nYes.", "stop", {"enable_thinking": True}),
        ("Hmm, </think> is a tag", "stop", {"enable_thinking": False}),
        (f"<think>\nHmm.\n</think>\n\nI look.\n{CALL}\n{CALL}", "stop", {}),
        (CALL[:-20], "length", {}),
        (CALL[:-20], "stop", {}),
        ("", "stop", {}),
    ],
)
@pytest.mark.parametrize("tokens_a_delta", [1, 5])
async def test_text_calls_and_counts_are_those_of_a_chat(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    scripted: Scripted,
    answer: str,
    finish: str,
    more: dict[str, Any],
    tokens_a_delta: int,
) -> None:
    """Guards against two APIs that answer one prompt differently, streamed or not."""
    scripted.text, scripted.finish, scripted.tokens_a_delta, scripted.cached_tokens = answer, finish, tokens_a_delta, 3
    tool = {"name": "get_weather", "input_schema": SCHEMA}
    message = await ask(client, tools=[tool], chat_template_kwargs=more)
    function = {"name": "get_weather", "parameters": SCHEMA}
    chat_body = {**BODY, "tools": [{"type": "function", "function": function}], "chat_template_kwargs": more}
    chat = (await client.post("/v1/chat/completions", json=chat_body)).json()
    assert len({call.prompt_ids for call in engine.calls}) == 1
    assert len({call.sampling for call in engine.calls}) == 1
    (choice,) = chat["choices"]
    found: dict[str, Any] = {"text": "", "thinking": "", "tool_use": []}
    for block in message["content"]:
        kind = block["type"]
        found[kind] += [block] if kind == "tool_use" else block[kind]
    assert found["text"] == (choice["message"]["content"] or "")
    assert found["thinking"] == choice["message"].get("reasoning_content", "")
    calls = [call["function"] for call in choice["message"].get("tool_calls", [])]
    assert [(block["name"], block["input"]) for block in found["tool_use"]] == [
        (call["name"], json.loads(call["arguments"]) if message["stop_reason"] == "tool_use" else {}) for call in calls
    ]
    usage = message["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == chat["usage"]["prompt_tokens"]
    assert usage["cache_read_input_tokens"] == 3 and usage["output_tokens"] == chat["usage"]["completion_tokens"]
    thinking = usage.get("output_tokens_details", {}).get("thinking_tokens", 0)
    assert thinking == chat["usage"].get("completion_tokens_details", {}).get("reasoning_tokens", 0)


@pytest.mark.parametrize(
    ("choice", "as_chat"),
    [
        ({"type": "any"}, {"tool_choice": "required"}),
        (
            {"type": "any", "disable_parallel_tool_use": True},
            {"tool_choice": "required", "parallel_tool_calls": False},
        ),
        (
            {"type": "tool", "name": "get_weather"},
            {"tool_choice": {"type": "function", "function": {"name": "get_weather"}}},
        ),
    ],
)
async def test_forced_calls_have_the_grammar_of_a_chat(
    client: httpx.AsyncClient, engine: FakeEngine, scripted: Scripted, choice: dict[str, Any], as_chat: dict[str, Any]
) -> None:
    """Guards against a call that is asked for and not forced, and against an agent that does not run a named one."""
    scripted.text = CALL
    message = await ask(client, tools=[{"name": "get_weather", "input_schema": SCHEMA}], tool_choice=choice)
    assert message["stop_reason"] == "tool_use" and message["content"][0]["input"] == {"city": "Rome"}
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}
    await client.post("/v1/chat/completions", json={**BODY, "tools": [tool], **as_chat})
    assert engine.calls[-1].sampling.grammar is not None
    assert len({(call.prompt_ids, call.sampling) for call in engine.calls}) == 1


async def test_stop_sequences_and_the_end_of_the_context(
    client: httpx.AsyncClient, engine: FakeEngine, scripted: Scripted
) -> None:
    """Guards against a stop without its reason, and against agents that ask for more than the context has."""
    message = await ask(client, stop_sequences=["a time", "x"])
    assert message["content"] == [{"type": "text", "text": "Once upon "}]
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "a time")
    scripted.finish = "length"
    message = await ask(client, max_tokens=32_000)
    assert message["stop_reason"] == "model_context_window_exceeded"
    call = engine.calls[-1]
    assert call.sampling.max_tokens == engine.model_len - len(call.prompt_ids)


async def test_a_prompt_is_put_into_the_cache_without_an_answer(client: httpx.AsyncClient) -> None:
    """Guards against an empty answer that has no end, or no usage."""
    message = await ask(client, max_tokens=0)
    assert (message["content"], message["stop_reason"], message["usage"]["output_tokens"]) == ([], "max_tokens", 0)


async def test_a_prompt_that_is_too_long_is_refused_in_words_that_agents_know(client: httpx.AsyncClient) -> None:
    """Guards against agents that end where they could shorten their conversation."""
    answer = await client.post(PATH, json={**BODY, "messages": [{"role": "user", "content": "Hi you " * 3000}]})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["message"].startswith("prompt is too long: ")


async def test_counting_is_that_of_the_answer(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """Guards against a count of another prompt, and against one that generates."""
    more = {
        "system": [{"type": "text", "text": "Be brief."}],
        "tools": [{"name": "f", "input_schema": SCHEMA}, {"type": "web_search_20250305", "name": "web_search"}],
        "thinking": {"type": "disabled"},
    }
    body = {key: value for key, value in BODY.items() if key != "max_tokens"} | more
    counted = await client.post(f"{COUNT}?beta=true", json=body)
    assert counted.status_code == 200 and engine.calls == []
    assert counted.headers["x-baton-ignored-parameters"] == "tools.web_search"
    usage = (await ask(client, **more))["usage"]
    assert counted.json() == {"input_tokens": usage["input_tokens"]}


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (Overloaded("full"), 429, "rate_limit_error"),
        (Overloaded("full", status=503), 503, "overloaded_error"),
        (PeerLost("gone"), 503, "overloaded_error"),
        (DeadlineExceeded("late"), 504, "timeout_error"),
        (InvariantBroken("a bug"), 500, "api_error"),
    ],
)
async def test_failures_before_and_in_an_answer(
    client: httpx.AsyncClient, scripted: Scripted, error: BatonError, status: int, kind: str
) -> None:
    """Guards against clients that read no error where there is one, or that retry what they must not."""
    scripted.error = error
    answer = await client.post(PATH, json=BODY)
    assert answer.status_code == status
    assert answer.json()["type"] == "error" and answer.json()["error"]["type"] == kind
    assert "retry-after" in answer.headers or status >= 500
    streamed = await client.post(PATH, json={**BODY, "stream": True})
    assert streamed.status_code == 200
    *events, last = events_of(streamed.text)
    assert events[0]["type"] == "message_start" and last == answer.json()
    assert not {"message_delta", "message_stop"} & {event["type"] for event in events}


@pytest.mark.parametrize("path", [PATH, COUNT])
@pytest.mark.parametrize(
    ("method", "body", "headers", "status", "kind"),
    [
        ("POST", b"{", {}, 400, "invalid_request_error"),
        ("POST", b'{"model": "demo"}', {}, 400, "invalid_request_error"),
        ("POST", json.dumps({**BODY, "model": "gpt-4"}).encode(), {}, 404, "not_found_error"),
        ("POST", b" " * 5000, {}, 413, "request_too_large"),
        ("GET", b"", {}, 405, "invalid_request_error"),
        ("POST", json.dumps(BODY).encode(), {"x-api-key": "other"}, 401, "authentication_error"),
        ("POST", json.dumps(BODY).encode(), {"x-api-key": "", "authorization": "Bearer "}, 401, "authentication_error"),
    ],
)
async def test_refusals_have_the_shape_of_the_api(
    guarded: httpx.AsyncClient, path: str, method: str, body: bytes, headers: dict[str, str], status: int, kind: str
) -> None:
    """Guards against errors in OpenAI's shape, which these clients show as nothing."""
    answer = await guarded.request(method, path, content=body, headers={"x-api-key": "secret", **headers})
    assert answer.status_code == status
    assert answer.json().keys() == {"type", "error"} and answer.json()["type"] == "error"
    assert answer.json()["error"].keys() == {"type", "message"} and answer.json()["error"]["type"] == kind


@pytest.fixture
def app_settings(request: pytest.FixtureRequest) -> AppSettings:
    guards = "guarded" in request.fixturenames
    return AppSettings(api_keys=("secret",), max_body_bytes=4096) if guards else AppSettings(debug_requests=4)


@pytest.fixture
def guarded(client: httpx.AsyncClient) -> httpx.AsyncClient:
    return client


async def test_a_batch_is_refused_by_name(client: httpx.AsyncClient) -> None:
    """Guards against a path of the API that looks like a mistake."""
    answer = await client.post(f"{PATH}/batches", json={})
    assert answer.status_code == 404 and "Message Batches" in answer.json()["error"]["message"]
    assert answer.json()["error"]["type"] == "not_found_error"


async def test_a_request_is_counted_and_found_by_its_id(client: httpx.AsyncClient) -> None:
    """Guards against an API beside metrics and traces."""
    message = (await client.post(PATH, json=BODY)).json()
    found = (await client.get(f"/debug/requests/{message['id']}")).json()
    assert [generation["outcome"] for generation in found["generations"]] == ["stop"]
    named = await client.post(PATH, json=BODY, headers={"x-request-id": "mine"})
    assert named.json()["id"] == "msg_mine" and named.headers["x-request-id"] == "mine"
    assert (await client.get("/debug/requests/msg_mine")).status_code == 200
    exposition = (await client.get("/metrics")).text
    assert 'finished_reason="stop"' in exposition
