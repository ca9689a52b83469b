"""pydantic-ai, unchanged: agents whose output is a tool, the server's form or a prompt, with tools, whole and streamed.

Run by test_clients.py in an environment of its own: argv[1] is the server, argv[2] how to draw. The demo model calls
only what it must, so the agent with a tool forces the first turn.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic_ai import Agent, ModelSettings, NativeOutput, PromptedOutput, RunContext, ToolOutput, UsageLimits
from pydantic_ai.messages import ToolCallPart, ToolReturnPart
from pydantic_ai.models import Model
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

BASE_URL, WANTED = sys.argv[1], json.loads(sys.argv[2])
(QUESTION,) = (message["content"] for message in WANTED["messages"])
EXTRA = {**WANTED["drawn"], "seed": 1}
DRAWN = ModelSettings(max_tokens=EXTRA.pop("max_tokens"), timeout=60, extra_body=EXTRA)
LIMITS = UsageLimits(request_limit=4)

provider = OpenAIProvider(base_url=BASE_URL, api_key="none")
MODELS = (OpenAIChatModel("demo", provider=provider), OpenAIResponsesModel("demo", provider=provider))


class Pet(BaseModel):
    """A pet of the story."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=12)
    kind: Literal["dog", "cat", "fox"]
    age: int = Field(ge=0, le=30)


class Walk(BaseModel):
    """Take a pet for a walk."""

    model_config = ConfigDict(extra="forbid")
    minutes: int = Field(ge=1, le=90)


class AnyObject(BaseModel):
    """What a prompt can promise of a model that tells stories."""


def agent(model: Model, output: Any, **extra: Any) -> Agent[None, Any]:
    settings = {**DRAWN, "extra_body": {**EXTRA, **extra}}
    return Agent(model, output_type=output, model_settings=settings, retries=0)


def check_outputs(model: Model) -> None:
    for output in (Pet, ToolOutput(Pet, strict=True), NativeOutput(Pet, strict=True)):
        result = agent(model, output).run_sync(QUESTION, usage_limits=LIMITS)
        assert isinstance(result.output, Pet), result
        assert result.usage.output_tokens > 5
    either = agent(model, [Pet, Walk]).run_sync(QUESTION, usage_limits=LIMITS).output
    assert isinstance(either, Pet | Walk)
    prompted = agent(model, PromptedOutput(AnyObject), logit_bias=WANTED["ends_objects"])
    assert prompted.run_sync(QUESTION, usage_limits=LIMITS).output == AnyObject()


async def check_streams(model: Model) -> None:
    for output in (ToolOutput(Pet), NativeOutput(Pet)):
        async with agent(model, output).run_stream(QUESTION, usage_limits=LIMITS) as stream:
            partial = [each async for each in stream.stream_output(debounce_by=None)]
        assert len(partial) > 1 and isinstance(partial[-1], Pet)
    async with agent(model, str, stop=["."]).run_stream(QUESTION, usage_limits=LIMITS) as stream:
        assert len([piece async for piece in stream.stream_text(delta=True, debounce_by=None)]) > 1


def force_first_turn(context: RunContext[None]) -> ModelSettings:
    extra = {**EXTRA, "stop": ["."]}  # the last turn is a sentence
    return {**DRAWN, "extra_body": extra, "tool_choice": "required" if context.run_step == 1 else "auto"}


def check_tool(model: Model) -> None:
    """The agent calls its tool, sends the answer, and ends with text."""
    walker = Agent(model, instructions="Tell stories.", model_settings=force_first_turn, retries=0)
    walks = []

    @walker.tool_plain
    def walk(pet: Literal["dog", "cat"], at_night: bool) -> str:
        """Take a pet for a walk."""
        walks.append((pet, at_night))
        return "They had a lot of fun."

    result = walker.run_sync(QUESTION, usage_limits=LIMITS)
    parts = [part for message in result.all_messages() for part in message.parts]
    calls = [part.tool_call_id for part in parts if isinstance(part, ToolCallPart)]
    answers = [part.tool_call_id for part in parts if isinstance(part, ToolReturnPart)]
    assert calls and len(calls) == len(walks)
    assert sorted(calls) == sorted(answers)
    assert result.output and result.usage.requests == 2


if __name__ == "__main__":
    for model in MODELS:
        check_outputs(model)
        asyncio.run(check_streams(model))
        check_tool(model)
