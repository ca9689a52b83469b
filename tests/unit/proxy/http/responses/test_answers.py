"""Answers of /v1/responses, whole and streamed, beside those of a chat with the same conversation.

Guards against events that clients cannot follow, items that differ between stream and end, and a second path from
tokens to text whose answers differ from those of chats.
"""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from baton.node.errors import PeerLost
from baton.proxy.http.app import create_app
from baton.proxy.interface import AppSettings
from baton.proxy.text.model_text import ModelText
from baton.testing.fake_engine import FakeEngine
from baton.tests.unit.proxy.http.responses.conftest import Answers
from baton.tests.unit.proxy.http.responses.event_rules import events_of, final_response

BODY: dict[str, Any] = {"model": "demo", "input": "x", "max_output_tokens": 400}
CHAT: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "x"}], "max_tokens": 400}
WEATHER = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
TOOLS = [{"type": "function", **WEATHER}]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
SAME_ID = {"x-request-id": "same"}


async def ask(client: httpx.AsyncClient, **more: Any) -> dict[str, Any]:
    """The response, after a check of its stream, which must end with the same."""
    whole = await client.post("/v1/responses", json={**BODY, **more}, headers=SAME_ID)
    assert whole.status_code == 200, whole.text
    response = whole.json()
    streamed = await client.post("/v1/responses", json={**BODY, **more, "stream": True}, headers=SAME_ID)
    ended = final_response(events_of(streamed.text))
    assert {**ended, "created_at": 0} == {**response, "created_at": 0}
    return response


def kinds(response: dict[str, Any]) -> list[str]:
    return [item["type"] for item in response["output"]]


async def test_a_text(client: httpx.AsyncClient, answers: Answers) -> None:
    answers.text = "Once upon a time."
    response = await ask(client)
    assert response["id"] == "resp_same" and response["object"] == "response" and response["status"] == "completed"
    (message,) = response["output"]
    assert message["content"] == [{"type": "output_text", "text": answers.text, "annotations": [], "logprobs": []}]
    usage = response["usage"]
    assert usage["input_tokens_details"] == {"cached_tokens": 3, "cache_write_tokens": 0}
    assert usage["output_tokens_details"] == {"reasoning_tokens": 0}
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


@pytest.mark.parametrize("num_together", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("<think>\na b\n</think>\n\nI look.\n" + CALL + "\n" + CALL, "reasoning message function_call function_call"),
        ("<think>\na b\n</think>\n\n" + CALL, "reasoning function_call"),
        (CALL, "function_call"),
        ("a b", "message"),
        ("<think>\na b\n</think>\n\nc", "reasoning message"),
        (CALL.replace('{"city": "Rome"}', "{}"), "function_call"),
        ("", "message"),
    ],
)
async def test_it_says_what_the_other_apis_say(
    client: httpx.AsyncClient, answers: Answers, written: str, expected: str, num_together: int
) -> None:
    answers.text, answers.num_together = written, num_together
    response = await ask(client, tools=TOOLS)
    chat_tools = [{"type": "function", "function": WEATHER}]
    chat = (await client.post("/v1/chat/completions", json={**CHAT, "tools": chat_tools}, headers=SAME_ID)).json()
    other_tools = [{"name": WEATHER["name"], "input_schema": WEATHER["parameters"]}]
    other = (await client.post("/v1/messages", json={**CHAT, "tools": other_tools}, headers=SAME_ID)).json()
    assert len(answers.prompts) == 4 and len(set(answers.prompts)) == 1, "the same prompt"
    assert kinds(response) == expected.split()
    message = chat["choices"][0]["message"]
    texts = {
        kind: "".join(item["content"][0]["text"] for item in response["output"] if item["type"] == kind)
        for kind in ("message", "reasoning")
    }
    assert texts == {"message": message["content"] or "", "reasoning": message.get("reasoning_content", "")}
    assert [(i["name"], i["arguments"]) for i in response["output"] if i["type"] == "function_call"] == [
        (call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", [])
    ]
    assert [response["usage"][name] for name in ("input_tokens", "output_tokens", "total_tokens")] == [
        chat["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")
    ]
    blocks = {kind: [block for block in other["content"] if block["type"] == kind] for kind in ("text", "tool_use")}
    assert "".join(block["text"] for block in blocks["text"]) == texts["message"]
    assert [(block["name"], block["input"]) for block in blocks["tool_use"]] == [
        (item["name"], json.loads(item["arguments"])) for item in response["output"] if item["type"] == "function_call"
    ]
    assert other["usage"]["output_tokens"] == response["usage"]["output_tokens"]
    assert other["usage"]["input_tokens"] + 3 == response["usage"]["input_tokens"], "three are cached"
    reasoning = chat["usage"].get("completion_tokens_details", {}).get("reasoning_tokens", 0)
    assert response["usage"]["output_tokens_details"]["reasoning_tokens"] == reasoning


async def test_the_effort_switches_reasoning(client: httpx.AsyncClient, answers: Answers) -> None:
    for effort, written, expected in (
        ("none", "c", "message"),
        ("high", "<think>\na\n</think>\n\nc", "reasoning message"),
    ):
        answers.text = written
        response = await ask(client, reasoning={"effort": effort})
        assert kinds(response) == expected.split()
        assert answers.prompts[-1].endswith("</think>\n\n") == (effort == "none")
        assert response["reasoning"] == {"effort": effort, "summary": None}


async def test_an_answer_that_was_cut_is_incomplete(client: httpx.AsyncClient, answers: Answers) -> None:
    answers.finish = "length"
    for written in ("Once upon", CALL.partition("ty")[0], "<think>\na b"):
        answers.text = written
        response = await ask(client, tools=TOOLS)
        assert response["status"] == "incomplete"
        assert response["incomplete_details"] == {"reason": "max_output_tokens"}
        assert [item["status"] for item in response["output"]] == ["incomplete"]


async def test_an_error_in_a_stream_ends_it_by_response_failed(client: httpx.AsyncClient, answers: Answers) -> None:
    """Guards clients that wait for a last event: Codex retries on this one, and takes a silent end for a lost line."""
    answers.text, answers.error = "Once upon a time.", PeerLost("gave up")
    events = events_of((await client.post("/v1/responses", json={**BODY, "stream": True})).text)
    response = final_response(events)
    assert response["error"] == {"code": "server_error", "message": "gave up"}
    assert response["output"][0]["status"] == "incomplete" and response["output"][0]["content"][0]["text"]
    whole = await client.post("/v1/responses", json=BODY)
    assert whole.status_code == 503 and whole.json()["error"]["code"] == "service_unavailable"


async def test_log_probabilities(client: httpx.AsyncClient, answers: Answers) -> None:
    """Asked for by `include`; those of tokens that complete no character come with the next text."""
    answers.text, answers.num_together = "A 🂡.", 1
    response = await ask(client, include=["message.output_text.logprobs"], top_logprobs=2)
    shown = response["output"][0]["content"][0]["logprobs"]
    assert len(shown) > 4 and all(len(entry["top_logprobs"]) == 2 for entry in shown)
    assert answers.text.encode().endswith(b"".join(bytes(entry["bytes"]) for entry in shown))
    assert (await ask(client, top_logprobs=2))["output"][0]["content"][0]["logprobs"] == []


async def test_the_request_is_repeated(client: httpx.AsyncClient, answers: Answers) -> None:
    answers.text = "a"
    given: dict[str, Any] = {
        "instructions": "Be brief.",
        "metadata": {"a": "b"},
        "user": "u",
        "temperature": 0.5,
        "top_p": 0.25,
        "tools": TOOLS,
        "parallel_tool_calls": False,
        "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}},
        "truncation": "auto",
        "max_output_tokens": 20,
        "store": True,
        "prompt_cache_key": "k",
        "safety_identifier": "s",
    }
    response = await ask(client, **given)
    for name in set(given) - {"tools", "text", "store"}:
        assert response[name] == given[name], name
    assert response["tools"] == [{"type": "function", "description": None, "strict": False, **WEATHER}]
    assert response["text"]["format"] == given["text"]["format"]
    assert response["store"] is False and response["previous_response_id"] is None
    plain = await ask(client)
    assert (plain["tool_choice"], plain["tools"], plain["text"]["format"]) == ("auto", [], {"type": "text"})


async def test_a_request_is_found_by_the_id_of_its_answer(answers: Answers, text: ModelText) -> None:
    """Guards the page of past requests, whose ids have this API's prefix."""
    answers.text = "a"
    app = create_app(FakeEngine(answers.script), {"demo": text}, AppSettings(debug_requests=True))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://proxy") as other:
        for headers in ({}, {"x-request-id": "mine-1"}):
            answer = (await other.post("/v1/responses", json=BODY, headers=headers)).json()
            past = await other.get(f"/debug/requests/{answer['id']}")
            assert past.status_code == 200 and past.json()["generations"][0]["operation"] == "chat"


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "function", "name": "get_weather"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_weather"}]},
    ],
)
async def test_calls_are_forced_as_in_a_chat(client: httpx.AsyncClient, answers: Answers, choice: Any) -> None:
    answers.text = CALL
    response = await ask(client, tools=TOOLS, tool_choice=choice)
    assert kinds(response) == ["function_call"] and response["tool_choice"] == choice
    name = {"type": "function", "function": {"name": "get_weather"}}
    in_a_chat = {"required": "required", "function": name, "allowed_tools": "required"}
    chat_choice = in_a_chat[choice if isinstance(choice, str) else choice["type"]]
    body = {**CHAT, "tools": [{"type": "function", "function": WEATHER}], "tool_choice": chat_choice}
    await client.post("/v1/chat/completions", json=body)
    assert answers.grammars[0] and len(set(answers.grammars)) == 1


async def test_a_schema_that_cannot_be_enforced_is_named_where_it_is(client: httpx.AsyncClient) -> None:
    odd = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=x)"}}}
    group = {"type": "namespace", "name": "n", "tools": [*TOOLS, {**TOOLS[0], "name": "f", "parameters": odd}]}
    group["tools"][1] |= {"strict": True}
    answer = await client.post("/v1/responses", json={**BODY, "tools": [group]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools.0.tools.1.parameters")


async def test_ignored_tools_are_named(client: httpx.AsyncClient, answers: Answers) -> None:
    answers.text = "a"
    tools = [*TOOLS, {"type": "web_search"}, {"type": "local_shell"}]
    answer = await client.post("/v1/responses", json={**BODY, "tools": tools})
    assert answer.headers["x-baton-ignored-parameters"] == "tools.web_search,tools.local_shell"
    assert [tool["type"] for tool in answer.json()["tools"]] == ["function"]
    assert "web_search" not in answers.prompts[0]


async def test_a_custom_tool_gets_free_text(client: httpx.AsyncClient, answers: Answers) -> None:
    patch = '*** Begin Patch\n"é"\n'
    call = json.dumps({"name": "apply_patch", "arguments": {"input": patch}}, ensure_ascii=False)
    answers.text = f"<tool_call>\n{call}\n</tool_call>"
    response = await ask(client, tools=[{"type": "custom", "name": "apply_patch", "description": "d"}])
    (item,) = response["output"]
    assert (item["type"], item["name"], item["input"]) == ("custom_tool_call", "apply_patch", patch)
    answers.text, answers.finish = answers.text.partition("Patch")[0], "length"
    cut = await ask(client, tools=[{"type": "custom", "name": "apply_patch"}])
    assert cut["output"][0]["status"] == "incomplete" and cut["output"][0]["input"].startswith("{")


async def test_a_namespace_is_part_of_the_name_for_the_model_only(client: httpx.AsyncClient, answers: Answers) -> None:
    tools = [{"type": "namespace", "name": "mcp__maps", "description": "d", "tools": TOOLS}]
    answers.text = CALL.replace("get_weather", "mcp__maps__get_weather")
    (item,) = (await ask(client, tools=tools))["output"]
    assert (item["namespace"], item["name"]) == ("mcp__maps", "get_weather")
    answers.text = "b"
    await ask(client, tools=tools, input=[item, {"type": "function_call_output", "call_id": "c", "output": "5"}])
    assert answers.prompts[-1].count("mcp__maps__get_weather") == 2
