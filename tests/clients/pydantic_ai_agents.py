"""pydantic-ai, unchanged: agents whose output has a form that the server keeps or a prompt asks for; and streams.

Run by test_clients.py in an environment of its own: argv[1] is the server, argv[2] how to draw.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic_ai import Agent, ModelSettings, NativeOutput, PromptedOutput, UsageLimits
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

BASE_URL, WANTED = sys.argv[1], json.loads(sys.argv[2])
(QUESTION,) = (message["content"] for message in WANTED["messages"])
DRAWN = ModelSettings(**WANTED["drawn"], seed=1, timeout=60)
LIMITS = UsageLimits(request_limit=4)

model = OpenAIChatModel("demo", provider=OpenAIProvider(base_url=BASE_URL, api_key="none"))


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


def agent(output: Any, **settings: Any) -> Agent[None, Any]:
    return Agent(model, output_type=output, model_settings={**DRAWN, **settings}, retries=0)


def check_outputs() -> None:
    for output in (NativeOutput(Pet), NativeOutput(Pet, strict=True)):
        result = agent(output).run_sync(QUESTION, usage_limits=LIMITS)
        assert isinstance(result.output, Pet), result
        assert result.usage.output_tokens > 5
    either = agent(NativeOutput([Pet, Walk])).run_sync(QUESTION, usage_limits=LIMITS).output
    assert isinstance(either, Pet | Walk)
    prompted = agent(PromptedOutput(AnyObject), logit_bias=WANTED["ends_objects"])
    assert prompted.run_sync(QUESTION, usage_limits=LIMITS).output == AnyObject()


async def check_streams() -> None:
    for output in (NativeOutput(Pet),):
        async with agent(output).run_stream(QUESTION, usage_limits=LIMITS) as stream:
            partial = [each async for each in stream.stream_output(debounce_by=None)]
        assert partial[-1] == (await agent(output).run(QUESTION, usage_limits=LIMITS)).output
    async with agent(str, max_tokens=8).run_stream(QUESTION, usage_limits=LIMITS) as stream:
        assert len([piece async for piece in stream.stream_text(delta=True, debounce_by=None)]) > 1


if __name__ == "__main__":
    check_outputs()
    asyncio.run(check_streams())
