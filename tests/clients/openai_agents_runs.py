"""openai-agents, unchanged: an agent that calls a tool and gets its answer, and one whose output has a form.

Run by test_clients.py in an environment of its own: argv[1] is the server, argv[2] how to draw. The demo model calls
only what it must: the first turn is forced, after which the library itself goes back to `auto`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any, Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel, ConfigDict, Field

BASE_URL, WANTED = sys.argv[1], json.loads(sys.argv[2])
(QUESTION,) = (message["content"] for message in WANTED["messages"])
EXTRA = {**WANTED["drawn"], "seed": 1}
DRAWN = ModelSettings(max_tokens=EXTRA.pop("max_tokens"), extra_body=EXTRA, include_usage=True)

set_tracing_disabled(True)


class Pet(BaseModel):
    """A pet of the story."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=12)
    kind: Literal["dog", "cat", "fox"]
    age: int = Field(ge=0, le=30)


@function_tool
def walk(pet: Literal["dog", "cat"], at_night: bool) -> str:
    """Take a pet for a walk."""
    return f"The {pet} had a lot of fun in the {'dark' if at_night else 'sun'}."


async def check_form(model: Any) -> None:
    agent = Agent("keeper", instructions="Tell stories.", model=model, model_settings=DRAWN, output_type=Pet)
    result = await Runner.run(agent, QUESTION, max_turns=2)
    assert isinstance(result.final_output, Pet), result
    streamed = Runner.run_streamed(agent, QUESTION, max_turns=2)
    kinds = [event.data.type async for event in streamed.stream_events() if event.type == "raw_response_event"]
    assert streamed.final_output == result.final_output
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert kinds.count("response.output_text.delta") > 1


async def check_tool(model: Any) -> None:
    """The last turn is a sentence: what has no end is an error for this library's model of `responses`."""
    settings = DRAWN.resolve(ModelSettings(tool_choice="required", extra_body={**EXTRA, "stop": ["."]}))
    agent = Agent("walker", instructions="Tell stories.", model=model, model_settings=settings, tools=[walk])
    result = await Runner.run(agent, QUESTION, max_turns=3)
    items = [item.type for item in result.new_items]
    assert items[0] == "tool_call_item" and items[-1] == "message_output_item", items
    assert items.count("tool_call_item") == items.count("tool_call_output_item")
    outputs = [item.output for item in result.new_items if item.type == "tool_call_output_item"]
    assert all("a lot of fun" in output for output in outputs), outputs
    assert result.final_output
    assert result.context_wrapper.usage.requests == 2 and result.context_wrapper.usage.output_tokens > 10
    streamed = Runner.run_streamed(agent, QUESTION, max_turns=3)
    async for _ in streamed.stream_events():
        pass
    assert [item.type for item in streamed.new_items] == items
    assert [item.output for item in streamed.new_items if item.type == "tool_call_output_item"] == outputs


async def check_all() -> None:
    async with AsyncOpenAI(base_url=BASE_URL, api_key="none", max_retries=0, timeout=60) as client:
        for model in (OpenAIChatCompletionsModel("demo", client), OpenAIResponsesModel("demo", client)):
            await check_form(model)
            await check_tool(model)


if __name__ == "__main__":
    asyncio.run(check_all())
