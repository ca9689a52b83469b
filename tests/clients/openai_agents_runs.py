"""openai-agents, unchanged: an agent whose output has a form, whole and streamed.

Run by test_clients.py in an environment of its own: argv[1] is the server, argv[2] how to draw.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any, Literal

from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, Runner, set_tracing_disabled
from openai import AsyncOpenAI
from pydantic import BaseModel, ConfigDict, Field

BASE_URL, WANTED = sys.argv[1], json.loads(sys.argv[2])
(QUESTION,) = (message["content"] for message in WANTED["messages"])
DRAWN = ModelSettings(**WANTED["drawn"], extra_args={"seed": 1}, include_usage=True)

set_tracing_disabled(True)


class Pet(BaseModel):
    """A pet of the story."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=12)
    kind: Literal["dog", "cat", "fox"]
    age: int = Field(ge=0, le=30)


async def check_form(model: Any) -> None:
    agent = Agent("keeper", instructions="Tell stories.", model=model, model_settings=DRAWN, output_type=Pet)
    result = await Runner.run(agent, QUESTION, max_turns=2)
    assert isinstance(result.final_output, Pet), result
    streamed = Runner.run_streamed(agent, QUESTION, max_turns=2)
    kinds = [event.data.type async for event in streamed.stream_events() if event.type == "raw_response_event"]
    assert streamed.final_output == result.final_output
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert kinds.count("response.output_text.delta") > 1


async def check_all() -> None:
    async with AsyncOpenAI(base_url=BASE_URL, api_key="none", max_retries=0, timeout=60) as client:
        model = OpenAIChatCompletionsModel("demo", client)
        await check_form(model)


if __name__ == "__main__":
    asyncio.run(check_all())
