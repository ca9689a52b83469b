"""openai-python, unchanged: what its users call, against the server at argv[1]; argv[2] holds what must come back.

Run by test_clients.py in an environment of its own; a failed assertion ends it with a traceback.
"""

from __future__ import annotations

import asyncio
import json
import sys

import openai

BASE_URL, WANTED = sys.argv[1], json.loads(sys.argv[2])
CHAT = {"model": "demo", "messages": WANTED["messages"], "temperature": 0, "max_tokens": WANTED["max_tokens"]}
COMPLETION = {"model": "demo", "prompt": WANTED["prompt"], "temperature": 0, "max_tokens": WANTED["max_tokens"]}

client = openai.OpenAI(base_url=BASE_URL, api_key="none", max_retries=0, timeout=60)


def check_models() -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"


def check_chat() -> None:
    answer = client.chat.completions.create(**CHAT)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", WANTED["chat"])
    assert choice.finish_reason == "length" and answer.object == "chat.completion"
    assert answer.usage.prompt_tokens == WANTED["chat_prompt_tokens"]
    assert answer.usage.completion_tokens == WANTED["max_tokens"]
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def check_streamed_chat() -> None:
    with client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True}) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == WANTED["chat"]
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[0].choices[0].delta.role == "assistant" and len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == WANTED["max_tokens"]


def check_stream_events() -> None:
    """The helper that accumulates a stream into the whole answer, here up to the model's own end."""
    ask = {**CHAT, "max_tokens": 400}
    with client.chat.completions.stream(**ask, logprobs=True, top_logprobs=2) as stream:
        events = {event.type for event in stream}
        answer = stream.get_final_completion()
    (choice,) = answer.choices
    assert choice.finish_reason == "stop" and choice.message.content.startswith(WANTED["chat"])
    assert choice.message.content == client.chat.completions.create(**ask).choices[0].message.content
    assert {"chunk", "content.delta", "content.done", "logprobs.content.delta", "logprobs.content.done"} <= events


def check_chat_logprobs() -> None:
    answer = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=3)
    entries = answer.choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == WANTED["chat"]
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token and entry.top_logprobs[0].logprob == entry.logprob <= 0


def check_completion() -> None:
    answer = client.completions.create(**COMPLETION, logprobs=2)
    assert answer.choices[0].text == WANTED["completion"]
    assert "".join(answer.choices[0].logprobs.tokens) == WANTED["completion"]
    streamed = client.completions.create(**COMPLETION, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == WANTED["completion"]
    several = client.completions.create(**{**COMPLETION, "prompt": [WANTED["prompt"], WANTED["prompt"][:40]]})
    assert [choice.index for choice in several.choices] == [0, 1]
    assert several.choices[0].text == WANTED["completion"]


def check_choices_and_seeds() -> None:
    drawn = {**CHAT, "temperature": 1.0, "seed": 11}
    three = client.chat.completions.create(**drawn, n=3)
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in three.choices]
    assert len(set(texts)) == 3
    assert [choice.message.content for choice in client.chat.completions.create(**drawn, n=3).choices] == texts
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**drawn, n=3, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def check_stop() -> None:
    stop = WANTED["chat"][20:26]
    answer = client.chat.completions.create(**CHAT, stop=[stop])
    assert answer.choices[0].message.content == WANTED["chat"][: WANTED["chat"].index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def check_errors() -> None:
    refused(openai.NotFoundError, "model_not_found", **{**CHAT, "model": "gpt-4"})
    refused(openai.BadRequestError, "context_length_exceeded", **{**CHAT, "max_tokens": 100_000})
    refused(openai.BadRequestError, None, **{**CHAT, "temperature": -1})
    assert refused(openai.BadRequestError, None, **{**CHAT, "messages": []}).param == "messages"


def refused(kind: type[openai.APIStatusError], code: str | None, **body: object) -> openai.APIStatusError:
    """The error that the request ends with, which must be of this kind; streamed or not."""
    for stream in (True, False):
        try:
            client.chat.completions.create(**body, stream=stream)
        except kind as error:
            assert error.code == code, error
            assert error.type and error.message
            found = error
        else:
            raise AssertionError(f"not refused: {body}")
    return found


async def check_async() -> None:
    """Sixteen at once, whole and streamed, through one AsyncOpenAI."""
    async with openai.AsyncOpenAI(base_url=BASE_URL, api_key="none", max_retries=0, timeout=60) as client:

        async def whole() -> str | None:
            return (await client.chat.completions.create(**CHAT)).choices[0].message.content

        async def streamed() -> str:
            stream = await client.chat.completions.create(**CHAT, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        texts = await asyncio.gather(*(ask() for ask in (whole, streamed) * 8))
    assert set(texts) == {WANTED["chat"]}


def check_abandoned_stream() -> None:
    """A client that leaves after the first chunk, then asks again."""
    with client.chat.completions.create(**{**CHAT, "max_tokens": 1000}, stream=True) as stream:
        next(iter(stream))
    assert client.chat.completions.create(**CHAT).choices[0].message.content == WANTED["chat"]


if __name__ == "__main__":
    check_models()
    check_chat()
    check_streamed_chat()
    check_stream_events()
    check_chat_logprobs()
    check_completion()
    check_choices_and_seeds()
    check_stop()
    check_errors()
    asyncio.run(check_async())
    check_abandoned_stream()
