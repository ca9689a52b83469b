"""anthropic (Python), unchanged: what its users and agents call, against the server at argv[1]; argv[2] holds what must
come back.

Run by test_clients.py in an environment of its own; a failed assertion ends it with a traceback.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Literal

import anthropic
import pydantic

BASE_URL, WANTED = sys.argv[1].removesuffix("/v1"), json.loads(sys.argv[2])
CHAT = {
    "model": "demo",
    "messages": WANTED["messages"],
    "max_tokens": WANTED["max_tokens"],
    "extra_body": {"temperature": 0},
}
WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


class Sunny(pydantic.BaseModel):
    city: Literal["Rome", "Oslo"]


client = anthropic.Anthropic(base_url=BASE_URL, api_key="none", max_retries=0, timeout=60)


def prompt_tokens(usage: anthropic.types.Usage) -> int:
    return usage.input_tokens + usage.cache_creation_input_tokens + usage.cache_read_input_tokens


def check_models() -> None:
    assert [model.id for model in client.models.list()] == ["demo"]


def check_messages() -> None:
    message = client.messages.create(**CHAT)
    (block,) = message.content
    assert (message.type, message.role, message.model) == ("message", "assistant", "demo")
    assert (block.type, block.text) == ("text", WANTED["chat"])
    assert (message.stop_reason, message.stop_sequence) == ("max_tokens", None) and message.id.startswith("msg_")
    assert prompt_tokens(message.usage) == WANTED["chat_prompt_tokens"]
    assert message.usage.output_tokens == WANTED["max_tokens"]


def check_streamed_messages() -> None:
    events = list(client.messages.create(**CHAT, stream=True))
    kinds = [event.type for event in events if event.type != "content_block_delta"]
    assert kinds == ["message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"]
    texts = [event.delta.text for event in events if event.type == "content_block_delta"]
    assert "".join(texts) == WANTED["chat"] and len(texts) > 5


def check_stream_helper() -> None:
    """It accumulates the events into the whole message."""
    with client.messages.stream(**CHAT) as stream:
        text = "".join(stream.text_stream)
        message = stream.get_final_message()
    assert text == message.content[0].text == WANTED["chat"]
    assert message.stop_reason == "max_tokens" and message.usage.output_tokens == WANTED["max_tokens"]
    assert prompt_tokens(message.usage) == WANTED["chat_prompt_tokens"]


def check_stop_sequences() -> None:
    stop = WANTED["chat"][20:26]
    message = client.messages.create(**CHAT, stop_sequences=[stop])
    assert message.content[0].text == WANTED["chat"][: WANTED["chat"].index(stop)]
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)


def check_count_tokens() -> None:
    counted = client.messages.count_tokens(model="demo", messages=WANTED["messages"])
    assert counted.input_tokens == WANTED["chat_prompt_tokens"]
    counted = client.messages.count_tokens(
        model="demo", messages=WANTED["messages"], system="Be kind.", tools=[WEATHER]
    )
    message = client.messages.create(**CHAT, system="Be kind.", tools=[WEATHER])
    assert counted.input_tokens == prompt_tokens(message.usage) > WANTED["chat_prompt_tokens"]


def check_tools() -> None:
    """Forced calls, whole and streamed, and the turn with the result of one."""
    ask = {
        "model": "demo",
        "max_tokens": 400,
        "messages": [{"role": "user", "content": "How is the weather in Rome?"}],
        "tools": [WEATHER],
        "extra_body": {"temperature": 1.0, "seed": 5},
    }
    for choice in ({"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "get_weather"}):
        message = client.messages.create(**ask, tool_choice=choice)
        (call,) = [block for block in message.content if block.type == "tool_use"]
        assert message.stop_reason == "tool_use" and call.name == "get_weather"
        assert call.input["city"] in ("Rome", "Oslo") and call.id
        with client.messages.stream(**ask, tool_choice=choice) as stream:
            streamed = stream.get_final_message()
        assert [block.input for block in streamed.content if block.type == "tool_use"] == [call.input]
        assert streamed.stop_reason == "tool_use"
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "Sunny, 20 degrees."}
    turns = [*ask["messages"], {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    message = client.messages.create(**{**ask, "messages": turns}, tool_choice={"type": "none"})
    assert {block.type for block in message.content} <= {"text", "thinking"}


def check_parse() -> None:
    message = client.messages.parse(
        model="demo",
        max_tokens=400,
        messages=[{"role": "user", "content": "Where is it sunny?"}],
        output_format=Sunny,
        extra_body={"temperature": 1.0, "seed": 5},
    )
    assert message.stop_reason == "end_turn" and message.parsed_output.city in ("Rome", "Oslo")


def check_thinking() -> None:
    """Reasoning comes back in blocks of its own, which the next turn sends along."""
    ask = {**CHAT, "max_tokens": 1200, "thinking": {"type": "enabled", "budget_tokens": 1024}}
    with client.messages.stream(**ask) as stream:
        message = stream.get_final_message()
    block = message.content[0]
    assert block.type == "thinking" and block.thinking and block.signature
    assert message.usage.output_tokens_details.thinking_tokens <= 1025
    turns = [
        *WANTED["messages"],
        {"role": "assistant", "content": message.content},
        {"role": "user", "content": "Why?"},
    ]
    answer = client.messages.create(**{**CHAT, "messages": turns}, thinking={"type": "disabled"})
    assert {block.type for block in answer.content} == {"text"}


def check_prefix_hits() -> None:
    """The second turn of an agent, whose billing header is another one, computes only what is new."""
    context = "She said that the fox was happy and ran to the tree to play. " * 120

    def ask(turn: int, messages: list[object]) -> anthropic.types.Message:
        header = f"x-anthropic-billing-header: cc_version=2.1.0; cch={turn}e4;"
        return client.messages.create(
            model="demo",
            max_tokens=16,
            system=[
                {"type": "text", "text": header},
                {"type": "text", "text": context, "cache_control": {"type": "ephemeral"}},
            ],
            messages=messages,
            extra_query={"beta": "true"},
        )

    turns = [{"role": "user", "content": "Who was happy?"}]
    first = ask(1, turns)
    second = ask(2, [*turns, {"role": "assistant", "content": first.content}, {"role": "user", "content": "Why?"}])
    assert second.usage.cache_read_input_tokens >= 0.99 * prompt_tokens(first.usage), (first.usage, second.usage)


def check_errors() -> None:
    refused(anthropic.NotFoundError, "not_found_error", **{**CHAT, "model": "another"})
    refused(anthropic.BadRequestError, "invalid_request_error", **{**CHAT, "extra_body": {"temperature": 2}})
    refused(anthropic.BadRequestError, "invalid_request_error", **{**CHAT, "messages": []})
    too_long = [{"role": "user", "content": "and so on " * 3000}]
    error = refused(anthropic.BadRequestError, "invalid_request_error", **{**CHAT, "messages": too_long})
    assert "prompt is too long" in error.message


def refused(kind: type[anthropic.APIStatusError], name: str, **body: object) -> anthropic.APIStatusError:
    """The error that the request ends with, which must be of this kind; streamed or not."""
    for stream in (True, False):
        try:
            client.messages.create(**body, stream=stream)
        except kind as error:
            assert error.body["type"] == "error" and error.body["error"]["type"] == name, error
            assert error.body["error"]["message"]
            found = error
        else:
            raise AssertionError(f"not refused: {body}")
    return found


async def check_async() -> None:
    """Eight at once, whole and streamed, through one AsyncAnthropic."""
    async with anthropic.AsyncAnthropic(base_url=BASE_URL, api_key="none", max_retries=0, timeout=60) as client:

        async def whole() -> str:
            return (await client.messages.create(**CHAT)).content[0].text

        async def streamed() -> str:
            async with client.messages.stream(**CHAT) as stream:
                return await stream.get_final_text()

        texts = await asyncio.gather(*(ask() for ask in (whole, streamed) * 4))
    assert set(texts) == {WANTED["chat"]}


if __name__ == "__main__":
    check_models()
    check_messages()
    check_streamed_messages()
    check_stream_helper()
    check_stop_sequences()
    check_count_tokens()
    check_tools()
    check_parse()
    check_thinking()
    check_prefix_hits()
    check_errors()
    asyncio.run(check_async())
