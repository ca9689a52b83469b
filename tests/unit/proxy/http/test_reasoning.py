"""Parameters and options of reasoning in chats, of the demo model, whose template has a switch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from baton.proxy.http.app import create_app
from baton.proxy.interface import AppSettings
from baton.proxy.text.model_text import ModelText
from baton.testing.fake_engine import FakeEngine
from baton.tests.unit.proxy.conftest import Says

BODY: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}
THINKS = {"chat_template_kwargs": {"enable_thinking": True}}
PLAIN, OPEN, CLOSED = "<|assistant|>\n", "<|assistant|>\n<think>\n", "<|assistant|>\n<think>\n\n</think>\n\n"


@pytest.fixture
def engine(says: Says) -> FakeEngine:
    return FakeEngine(says("so</think>ok"))


async def ask(client: httpx.AsyncClient, **more: Any) -> dict[str, Any]:
    answer = await client.post("/v1/chat/completions", json={**BODY, **more})
    found: dict[str, Any] = answer.json()
    return found


async def chunks(client: httpx.AsyncClient, **more: Any) -> list[dict[str, Any]]:
    answer = await client.post("/v1/chat/completions", json={**BODY, **more, "stream": True})
    parts = [part.removeprefix("data: ") for part in answer.text.split("\n\n") if part]
    return [json.loads(part) for part in parts if part != "[DONE]"]


@pytest.mark.parametrize(
    ("more", "end"),
    [
        ({}, PLAIN),
        ({"reasoning_effort": "none"}, CLOSED),
        ({"reasoning_effort": "minimal"}, CLOSED),
        ({"reasoning_effort": "low"}, OPEN),
        ({"reasoning_effort": "high"}, OPEN),
        ({"reasoning_effort": None, **THINKS}, OPEN),
        ({"reasoning_effort": "none", **THINKS}, OPEN),
        ({"enable_thinking": True}, OPEN),
        ({"enable_thinking": False, **THINKS}, OPEN),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}, "reasoning_effort": "none"}, OPEN),
        ({"thinking": {"type": "disabled"}, "enable_thinking": None}, CLOSED),
        ({"thinking": {"type": "auto"}}, PLAIN),
    ],
)
async def test_the_effort_switches_reasoning(client: httpx.AsyncClient, more: dict[str, Any], end: str) -> None:
    """Guards against an effort that the prompt does not show; variables that the client names come first."""
    answer = await client.post("/v1/chat/completions/render", json={**BODY, **more})
    assert answer.json()["prompt"] == f"<|user|>\nHi<|end|>\n{end}"


async def test_an_effort_that_is_none_is_refused(client: httpx.AsyncClient) -> None:
    both = {"enable_thinking": True, "thinking": {"type": "disabled"}}
    assert (await ask(client, **both))["error"]["param"] == "thinking"
    for body in ({"reasoning_effort": "huge"}, {"reasoning_effort": 1}):
        assert (await ask(client, **body))["error"]["param"] == "reasoning_effort"
    answer = await client.post("/v1/completions", json={"model": "demo", "prompt": "x", "reasoning_effort": "low"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "reasoning_effort")


@pytest.mark.parametrize(
    ("more", "most"),
    [
        (THINKS, 7),
        ({**THINKS, "response_format": {"type": "json_object"}}, 7),
        ({"reasoning_effort": "none"}, None),
        ({}, None),
    ],
)
async def test_a_budget_bounds_reasoning(
    client: httpx.AsyncClient, engine: FakeEngine, more: dict[str, Any], most: int | None
) -> None:
    """Guards against a bound that workers never see, and a grammar for answers without reasoning."""
    for budget in (7, -1, None):
        assert "choices" in await ask(client, **more, thinking_token_budget=budget)
        grammar = engine.calls[-1].sampling.grammar
        if budget == 7:
            assert (grammar and grammar.max_reasoning) == most
        assert (grammar is None) == ("response_format" not in more and (budget != 7 or most is None))


async def test_a_budget_that_cannot_be_kept_is_refused(client: httpx.AsyncClient) -> None:
    asked = {**THINKS, "thinking_token_budget": 7}
    assert (await ask(client, **asked, ignore_eos=True))["error"]["param"] == "ignore_eos"
    assert (await ask(client, thinking_token_budget=-2))["error"]["param"] == "thinking_token_budget"


async def test_a_budget_needs_markers_that_are_tokens(says: Says, text_of_brackets: ModelText) -> None:
    """Guards against a bound that is dropped in silence."""
    app = create_app(FakeEngine(says("ok")), {"demo": text_of_brackets}, AppSettings())
    messages = [{"role": "assistant", "content": "[THINK]"}]
    more = {"messages": messages, "continue_final_message": True, "thinking_token_budget": 7}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://proxy") as client:
        assert (await ask(client, **more))["error"]["param"] == "thinking_token_budget"


async def test_reasoning_can_be_left_out(client: httpx.AsyncClient) -> None:
    """Guards against chunks without content for each token that is not shown."""
    for shows in (True, None, False):
        answer = await ask(client, **THINKS, include_reasoning=shows)
        message = answer["choices"][0]["message"]
        assert message["content"] == "ok" and ("reasoning_content" in message) == (shows is not False)
        assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] > 1
        deltas = [each["choices"][0]["delta"] for each in await chunks(client, **THINKS, include_reasoning=shows)]
        assert any("reasoning_content" in delta for delta in deltas) == (shows is not False)
        assert shows is not False or {} not in deltas[:-1]


async def test_usage_of_chats_counts_reasoning(client: httpx.AsyncClient) -> None:
    """OpenAI's answers have the field, also where there was none."""
    usage = (await ask(client))["usage"]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 0}
    (last,) = [each["usage"] for each in await chunks(client, stream_options={"include_usage": True}) if each["usage"]]
    assert last["completion_tokens_details"] == {"reasoning_tokens": 0}
    answer = await client.post("/v1/completions", json={"model": "demo", "prompt": "x"})
    assert "completion_tokens_details" not in answer.json()["usage"]


@pytest.fixture(scope="module")
def text_of_brackets(demo_folder: Path) -> Iterator[ModelText]:
    made = ModelText(demo_folder, reasoning_format="think_brackets")
    yield made
    made.close()


async def test_options_overrule_markers_and_name(says: Says, text_of_brackets: ModelText, demo_folder: Path) -> None:
    """Guards a model whose markers are not found, and clients that read vLLM's newer name of the field."""
    none = ModelText(demo_folder, reasoning_format="none")
    for text, written, shown in (
        (text_of_brackets, "[THINK]so[/THINK]ok", {"content": "ok", "reasoning": "so"}),
        (none, "so</think>ok", {"content": "so</think>ok"}),
    ):
        app = create_app(FakeEngine(says(written)), {"demo": text}, AppSettings(reasoning_field="reasoning"))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://proxy") as client:
            message = (await ask(client, **THINKS))["choices"][0]["message"]
            deltas = [each["choices"][0]["delta"] for each in await chunks(client, **THINKS)]
        assert message == {"role": "assistant", "refusal": None, **shown}
        for name in ("content", "reasoning", "reasoning_content"):
            assert "".join(delta.get(name) or "" for delta in deltas) == shown.get(name, "")
    none.close()


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
async def test_both_names_of_reasoning_reach_the_template(client: httpx.AsyncClient, name: str) -> None:
    earlier = {"role": "assistant", "content": "", name: "so"}
    answer = await client.post("/v1/chat/completions/render", json={**BODY, "messages": [*BODY["messages"], earlier]})
    assert "<|assistant|>\n<think>\nso\n</think>\n\n<|end|>" in answer.json()["prompt"]
