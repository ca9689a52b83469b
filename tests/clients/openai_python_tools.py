"""openai-python, unchanged: answers of a given form, `parse`, and calls of tools, whole, streamed and accumulated.

Run by test_clients.py in an environment of its own: argv[1] is the server, argv[2] how to draw. The demo model only
tells stories, so its calls are forced; for `auto` a conversation that has calls and their answers is sent.
"""

from __future__ import annotations

import json
import sys
from typing import Any, Literal

import jsonschema
import openai
from pydantic import BaseModel, ConfigDict, Field

BASE_URL, WANTED = sys.argv[1], json.loads(sys.argv[2])
ASK: dict[str, Any] = {"model": "demo", "messages": WANTED["messages"], **WANTED["drawn"]}
SEEDS = range(2)

client = openai.OpenAI(base_url=BASE_URL, api_key="none", max_retries=0, timeout=60)


class Toy(BaseModel):
    model_config = ConfigDict(extra="forbid")
    colour: Literal["red", "blue"]
    price: int | None = Field(ge=0, le=99)


class Pet(BaseModel):
    """A pet of the story."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=12)
    kind: Literal["dog", "cat", "fox"]
    toys: list[Toy] = Field(min_length=1, max_length=1)


class Walk(BaseModel):
    """Take a pet for a walk."""

    model_config = ConfigDict(extra="forbid")
    pet: Literal["dog", "cat", "fox"]
    minutes: int = Field(ge=1, le=90)


SCHEMA = Pet.model_json_schema()
FORMAT = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA, "strict": True}}
TOOLS = [openai.pydantic_function_tool(Walk), openai.pydantic_function_tool(Toy, name="buy-toy")]
PARAMETERS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
NAMED = {"type": "function", "function": {"name": "Walk"}}


def check_schema() -> None:
    """What jsonschema, which shares no code with the server, accepts; the same streamed."""
    texts = []
    for seed in SEEDS:
        (choice,) = client.chat.completions.create(**ASK, seed=seed, response_format=FORMAT).choices
        assert choice.finish_reason == "stop", choice
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)
        texts.append(choice.message.content)
    assert len(set(texts)) == len(texts)
    stream = client.chat.completions.create(**ASK, seed=SEEDS[0], response_format=FORMAT, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == texts[0]


def check_parse() -> None:
    message = client.chat.completions.parse(**ASK, seed=1, response_format=Pet).choices[0].message
    assert isinstance(message.parsed, Pet)
    with client.chat.completions.stream(**ASK, seed=1, response_format=Pet) as stream:
        (done,) = (event for event in stream if event.type == "content.done")
        streamed = stream.get_final_completion().choices[0].message
    assert streamed.content == message.content
    assert done.parsed == streamed.parsed == message.parsed


def check_object() -> None:
    """An object of any form, cut as it need not end: a beginning of one."""
    ask = {**ASK, "max_tokens": 8}
    (choice,) = client.chat.completions.create(**ask, response_format={"type": "json_object"}).choices
    assert choice.message.content.startswith("{")
    assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content), dict)


def check_cut() -> None:
    """`parse` raises where the answer ended by its length."""
    try:
        client.chat.completions.parse(**{**ASK, "max_tokens": 3}, response_format=Pet)
    except openai.LengthFinishReasonError:
        return
    raise AssertionError("three tokens were a whole pet")


def check_required() -> None:
    for seed in SEEDS:
        ask = {**ASK, "seed": seed, "tools": TOOLS, "tool_choice": "required"}
        (choice,) = client.chat.completions.parse(**ask).choices
        assert choice.finish_reason == "tool_calls" and choice.message.content is None, choice
        check_calls(choice.message.tool_calls)
        with client.chat.completions.stream(**ask) as stream:
            kinds = {event.type for event in stream}
            (streamed,) = stream.get_final_completion().choices
        assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
        assert calls_of(streamed.message) == calls_of(choice.message)
        assert streamed.finish_reason == "tool_calls"


def check_calls(calls: list[Any]) -> None:
    assert calls and len({call.id for call in calls}) == len(calls)
    for call in calls:
        assert call.type == "function"
        jsonschema.validate(json.loads(call.function.arguments), PARAMETERS[call.function.name])
        assert type(call.function.parsed_arguments) is {"Walk": Walk, "buy-toy": Toy}[call.function.name]


def calls_of(message: Any) -> list[tuple[str, str]]:
    return [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]


def check_named() -> None:
    ask = {**ASK, "seed": 1, "tools": TOOLS, "tool_choice": NAMED}
    (choice,) = client.chat.completions.parse(**ask).choices
    assert choice.finish_reason == "stop"
    assert isinstance(choice.message.tool_calls[0].function.parsed_arguments, Walk)
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**ask, stream=True)]
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["stop"]
    deltas = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    assert [(call.function.name, call.type, call.id is None) for call in deltas] == [
        ("Walk", "function", False),
        *[(None, None, True)] * (len(deltas) - 1),
    ]
    assert ("Walk", "".join(call.function.arguments for call in deltas)) in calls_of(choice.message)


def check_several_calls() -> None:
    """Calls that only the length ends, as a bias forbids their end: whole ones but the last, at rising indices."""
    ask = {**ASK, "seed": 1, "tools": TOOLS, "tool_choice": "required", "max_tokens": 140}
    ask["logit_bias"] = WANTED["forbids_end"]
    (choice,) = client.chat.completions.create(**ask).choices
    assert choice.finish_reason == "length"
    calls = calls_of(choice.message)
    assert len(calls) > 1
    for name, arguments in calls[:-1]:
        jsonschema.validate(json.loads(arguments), PARAMETERS[name])
    chunks = client.chat.completions.create(**ask, stream=True)
    deltas = [chunk.choices[0].delta.tool_calls or () for chunk in chunks]
    assert [call.index for each in deltas for call in each if call.id] == [*range(len(calls))]
    assert all(len(each) <= 1 for each in deltas)  # some clients read only the first
    streamed = [""] * len(calls)
    for each in deltas:
        for call in each:
            streamed[call.index] += call.function.arguments
    assert streamed == [arguments for _, arguments in calls]


def check_one_call() -> None:
    ask = {**ASK, "seed": 4, "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    assert len(calls_of(client.chat.completions.create(**ask).choices[0].message)) == 1


def check_allowed_tools() -> None:
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "buy-toy"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    message = client.chat.completions.create(**ASK, seed=0, tools=TOOLS, tool_choice=choice).choices[0].message
    assert {name for name, _ in calls_of(message)} == {"buy-toy"}


def check_answers_of_tools() -> None:
    """A second turn, with the calls as they came and their answers, for `auto` and `none`."""
    first = client.chat.completions.create(**ASK, seed=2, tools=TOOLS, tool_choice="required").choices[0].message
    answers = [
        {"role": "tool", "tool_call_id": call.id, "content": "They had a lot of fun."} for call in first.tool_calls
    ]
    turns = [*ASK["messages"], first, *answers]
    for choice in ("auto", "none"):
        ask = {**ASK, "messages": turns, "temperature": 0, "max_tokens": 16, "tools": TOOLS, "tool_choice": choice}
        (second,) = client.chat.completions.create(**ask).choices
        assert second.message.content and not second.message.tool_calls
        assert second.finish_reason in ("stop", "length")


def check_refusals() -> None:
    unknown = {"type": "function", "function": {"name": "fly"}}
    for wrong, param in ((unknown, "tool_choice"), ("sometimes", "tool_choice")):
        try:
            client.chat.completions.create(**ASK, tools=TOOLS, tool_choice=wrong)
        except openai.BadRequestError as error:
            assert error.param.startswith(param), error
        else:
            raise AssertionError(f"not refused: {wrong}")


if __name__ == "__main__":
    check_schema()
    check_parse()
    check_object()
    check_cut()
    check_required()
    check_named()
    check_several_calls()
    check_one_call()
    check_allowed_tools()
    check_answers_of_tools()
    check_refusals()
