"""LiteLLM, unchanged: completion and streaming of both APIs, whole and async, forms, calls, its errors and its router.

Run by test_clients.py in an environment of its own: argv[1] is the server, argv[2] what must come back.
"""

from __future__ import annotations

import asyncio
import json
import sys

import jsonschema
import litellm

BASE_URL, WANTED = sys.argv[1], json.loads(sys.argv[2])
SERVER = {"api_base": BASE_URL, "api_key": "none", "max_retries": 0, "timeout": 60}
ASK = {"messages": WANTED["messages"], "temperature": 0, "max_tokens": WANTED["max_tokens"]}
PROVIDERS = ("openai", "hosted_vllm")
"""The two prefixes with which a server like this one is configured."""

WALK = {
    "type": "object",
    "properties": {"pet": {"enum": ["dog", "cat"]}, "minutes": {"type": "integer", "minimum": 1, "maximum": 90}},
    "required": ["pet", "minutes"],
    "additionalProperties": False,
}

litellm.suppress_debug_info = True  # else each expected error prints a request for feedback


def check_chat(provider: str) -> None:
    answer = litellm.completion(model=f"{provider}/demo", **SERVER, **ASK)
    assert answer.choices[0].message.content == WANTED["chat"]
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == WANTED["chat_prompt_tokens"]
    assert answer.usage.completion_tokens == WANTED["max_tokens"]


def check_stream(provider: str) -> None:
    chunks = list(
        litellm.completion(
            model=f"{provider}/demo", **SERVER, **ASK, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == WANTED["chat"]
    built = litellm.stream_chunk_builder(chunks, messages=WANTED["messages"])
    assert built.choices[0].message.content == WANTED["chat"]
    assert built.usage.completion_tokens == WANTED["max_tokens"]


async def check_async(provider: str) -> None:
    stream = await litellm.acompletion(model=f"{provider}/demo", **SERVER, **ASK, stream=True)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == WANTED["chat"]


def check_parameters(provider: str) -> None:
    """What LiteLLM maps or passes on: top_logprobs, stop, n, seed, and vLLM's own through extra_body."""
    model = f"{provider}/demo"
    entries = litellm.completion(model=model, **SERVER, **ASK, logprobs=True, top_logprobs=2).choices[0].logprobs
    assert len(entries["content"]) == WANTED["max_tokens"]
    stop = WANTED["chat"][20:26]
    cut = litellm.completion(model=model, **SERVER, **ASK, stop=stop).choices[0]
    assert cut.message.content == WANTED["chat"][: WANTED["chat"].index(stop)] and cut.finish_reason == "stop"
    drawn = {**ASK, "temperature": 1.0, "seed": 5, "n": 2, "extra_body": {"top_k": 50, "min_p": 0.01}}
    two = [choice.message.content for choice in litellm.completion(model=model, **SERVER, **drawn).choices]
    assert len(set(two)) == 2
    assert [choice.message.content for choice in litellm.completion(model=model, **SERVER, **drawn).choices] == two


def check_form_and_calls(provider: str) -> None:
    """A schema, and a call of a tool, whole and from the chunks of a stream."""
    ask = {"model": f"{provider}/demo", "messages": WANTED["messages"], "seed": 1, **SERVER, **WANTED["drawn"]}
    form = {"type": "json_schema", "json_schema": {"name": "walk", "schema": WALK, "strict": True}}
    jsonschema.validate(json.loads(litellm.completion(**ask, response_format=form).choices[0].message.content), WALK)
    tool = {"type": "function", "function": {"name": "walk", "parameters": WALK}}
    # One provider takes additionalProperties out of the schema: the bias ends arguments before properties of their own.
    forced = {**ask, "tools": [tool], "tool_choice": "required", "logit_bias": WANTED["ends_objects"]}
    (choice,) = litellm.completion(**forced).choices
    assert choice.finish_reason == "tool_calls"
    built = litellm.stream_chunk_builder(list(litellm.completion(**forced, stream=True))).choices[0]
    for message in (choice.message, built.message):
        assert {call.function.name for call in message.tool_calls} == {"walk"}
        for call in message.tool_calls:
            jsonschema.validate(json.loads(call.function.arguments), WALK)
    assert [call.function.arguments for call in built.message.tool_calls] == [
        call.function.arguments for call in choice.message.tool_calls
    ]


def check_text_completion() -> None:
    ask = {"prompt": WANTED["prompt"], "temperature": 0, "max_tokens": WANTED["max_tokens"]}
    model = "text-completion-openai/demo"
    assert litellm.text_completion(model=model, **SERVER, **ask).choices[0].text == WANTED["completion"]
    chunks = litellm.text_completion(model=model, **SERVER, **ask, stream=True)
    assert "".join(chunk.choices[0].text or "" for chunk in chunks) == WANTED["completion"]


def check_errors(provider: str) -> None:
    refused(litellm.NotFoundError, model=f"{provider}/gpt-4", **SERVER, **ASK)
    refused(litellm.BadRequestError, model=f"{provider}/demo", **SERVER, **{**ASK, "temperature": -1})
    refused(litellm.ContextWindowExceededError, model=f"{provider}/demo", **SERVER, **{**ASK, "max_tokens": 100_000})


def refused(kind: type[Exception], **ask: object) -> None:
    try:
        litellm.completion(**ask)
    except kind:
        return
    raise AssertionError(f"not refused: {ask}")


async def check_router() -> None:
    """The router that the LiteLLM proxy is made of."""
    router = litellm.Router([{"model_name": "fast", "litellm_params": {"model": "hosted_vllm/demo", **SERVER}}])
    answer = await router.acompletion(model="fast", **ASK)
    assert answer.choices[0].message.content == WANTED["chat"]


if __name__ == "__main__":
    for provider in PROVIDERS:
        check_chat(provider)
        check_stream(provider)
        asyncio.run(check_async(provider))
        check_parameters(provider)
        check_form_and_calls(provider)
        check_errors(provider)
    check_text_completion()
    asyncio.run(check_router())
