"""Predicted outputs of chats, as OpenAI has them, and `speculative`."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from baton.proxy.interface import Delta
from baton.proxy.text.model_text import ModelText
from baton.testing.fake_engine import EngineCall, FakeEngine

BODY: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}
TEXT = "Once upon a time there was a little girl"


@pytest.fixture
def engine(text: ModelText) -> FakeEngine:
    ids = text.encode(TEXT, add_special_tokens=False)

    def script(call: EngineCall) -> list[Any]:
        if call.generation.prediction_ids is None:
            return [Delta(ids[:2]), Delta(ids[2:], finish="length")]
        return [Delta(ids[:2]), Delta(ids[2:5], accepted_prediction=2), Delta(ids[5:6], finish="length")]

    return FakeEngine(script)


async def ask(client: httpx.AsyncClient, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = (await client.post("/v1/chat/completions", json={**BODY, **more})).json()
    return found


@pytest.mark.parametrize("content", [TEXT, [{"type": "text", "text": TEXT[:9]}, {"type": "text", "text": TEXT[9:]}]])
async def test_a_prediction_reaches_workers_and_usage_says_what_was_accepted(client, engine, text, content) -> None:
    """Guards against a prediction that is dropped in silence, and usage without OpenAI's fields."""
    usage = (await ask(client, prediction={"type": "content", "content": content}))["usage"]
    predicted = text.encode(TEXT, add_special_tokens=False)
    assert engine.calls[-1].generation.prediction_ids == predicted
    details = usage["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] == 2
    assert details["rejected_prediction_tokens"] == len(predicted) - 2


async def test_answers_may_be_had_without_guesses(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """Guards against a switch that workers never see."""
    for asked in (None, True, False):
        await ask(client, speculative=asked)
        assert engine.calls[-1].generation.speculate == (asked is not False)


@pytest.mark.parametrize(
    "more",
    [
        {"n": 2},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
        {"prediction": {"type": "content", "content": "word " * 5000}},
        {"prediction": {"type": "other", "content": "x"}},
        {"prediction": "x"},
    ],
)
async def test_a_prediction_that_cannot_be_one_is_refused(client: httpx.AsyncClient, more: dict[str, Any]) -> None:
    answer = await ask(client, **{"prediction": {"type": "content", "content": "x"}, **more})
    assert answer["error"]["param"].split(".")[0] == "prediction"
