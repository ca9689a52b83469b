"""The `openai` package's `responses`, unchanged: create, stream and parse."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from baton.tests.unit.proxy.http.responses.conftest import Answers
from baton.tests.unit.proxy.http.responses.test_answers import CALL, TOOLS


class City(BaseModel):
    name: str


@pytest.fixture
async def ours(client: httpx.AsyncClient) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(api_key="x", base_url="http://proxy/v1", http_client=client) as made:
        yield made


async def test_create(ours: openai.AsyncOpenAI, answers: Answers) -> None:
    answers.text = "Once upon a time."
    response = await ours.responses.create(model="demo", input="x", instructions="Be brief.")
    assert response.output_text == answers.text and response.status == "completed"
    assert response.usage is not None and response.usage.input_tokens_details.cached_tokens == 3


async def test_counts(ours: openai.AsyncOpenAI, answers: Answers) -> None:
    """The count of a prompt is what an answer to it says."""
    answers.text = "a"
    asked: Any = {"model": "demo", "input": "x", "instructions": "Be brief.", "tools": TOOLS}
    counted = await ours.responses.input_tokens.count(**asked)
    assert not answers.prompts
    response = await ours.responses.create(**asked)
    assert response.usage is not None and counted.input_tokens == response.usage.input_tokens
    assert counted.object == "response.input_tokens"


async def test_the_stream_helper(ours: openai.AsyncOpenAI, answers: Answers) -> None:
    """Its accumulator raises on events out of order."""
    answers.text = f"<think>\na b\n</think>\n\nI look.\n{CALL}"
    async with ours.responses.stream(model="demo", input="x", tools=TOOLS) as stream:  # type: ignore[arg-type]
        seen = [event.type async for event in stream]
        response = await stream.get_final_response()
    assert seen[0] == "response.created" and seen[-1] == "response.completed"
    assert "response.reasoning_text.delta" in seen and "response.function_call_arguments.delta" in seen
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call"]
    assert response.output_text == "I look."


async def test_parse(ours: openai.AsyncOpenAI, answers: Answers) -> None:
    answers.text = '{"name": "Rome"}'
    response = await ours.responses.parse(model="demo", input="x", text_format=City)
    assert response.output_parsed == City(name="Rome")


async def test_errors(ours: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await ours.responses.create(model="demo", input="x", previous_response_id="resp_1")
    assert (caught.value.param, caught.value.code) == ("previous_response_id", "previous_response_not_found")
    with pytest.raises(openai.NotFoundError):
        await ours.responses.create(model="other", input="x")
    with pytest.raises(openai.NotFoundError, match="stored responses"):
        await ours.responses.retrieve("resp_1")
