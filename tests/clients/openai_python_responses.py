"""openai-python, unchanged: `responses`, whole, streamed by its helper and parsed, with calls and their answers.

Run by test_clients.py in an environment of its own: argv[1] is the server, argv[2] what must come back and how to draw.
"""

from __future__ import annotations

import json
import sys
from typing import Any, Literal

import jsonschema
import openai
from pydantic import BaseModel, ConfigDict, Field

BASE_URL, WANTED = sys.argv[1], json.loads(sys.argv[2])
(QUESTION,) = (message["content"] for message in WANTED["messages"])
EXTRA = {**WANTED["drawn"], "seed": 1}
DRAWN = {"max_output_tokens": EXTRA.pop("max_tokens"), "extra_body": EXTRA}
ASK: dict[str, Any] = {"model": "demo", "input": QUESTION, "store": False}
GREEDY = {**ASK, "temperature": 0, "max_output_tokens": WANTED["max_tokens"]}

client = openai.OpenAI(base_url=BASE_URL, api_key="none", max_retries=0, timeout=60)


class Pet(BaseModel):
    """A pet of the story."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=12)
    kind: Literal["dog", "cat", "fox"]
    age: int = Field(ge=0, le=30)


class Walk(BaseModel):
    """Take a pet for a walk."""

    model_config = ConfigDict(extra="forbid")
    pet: Literal["dog", "cat", "fox"]
    minutes: int = Field(ge=1, le=90)


PARSED_TOOL = openai.pydantic_function_tool(Walk)
TOOL = {"type": "function", **PARSED_TOOL["function"]}


def check_text() -> None:
    answer = client.responses.create(**GREEDY)
    assert answer.output_text == WANTED["chat"]
    assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage.input_tokens == WANTED["chat_prompt_tokens"]
    assert answer.usage.output_tokens == WANTED["max_tokens"]
    with client.responses.stream(**GREEDY) as stream:
        events = list(stream)
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == WANTED["chat"]
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == WANTED["chat"]
    assert events[-1].response.usage.total_tokens == answer.usage.total_tokens


def check_turns() -> None:
    """Instructions, and the items of an answer sent back as they came."""
    first = client.responses.create(**GREEDY, instructions="Tell stories.")
    turns = [{"role": "user", "content": QUESTION}, *first.output, {"role": "user", "content": "Go on."}]
    second = client.responses.create(**{**GREEDY, "input": turns}, instructions="Tell stories.")
    assert second.output_text and second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens


def check_parse() -> None:
    answer = client.responses.parse(**ASK, **DRAWN, text_format=Pet)
    assert answer.status == "completed", answer
    assert isinstance(answer.output_parsed, Pet)
    jsonschema.validate(json.loads(answer.output_text), Pet.model_json_schema())
    with client.responses.stream(**ASK, **DRAWN, text_format=Pet) as stream:
        assert stream.until_done().get_final_response().output_parsed == answer.output_parsed


def check_calls() -> None:
    for choice in ("required", {"type": "function", "name": "Walk"}):
        ask = {**ASK, **DRAWN, "tools": [PARSED_TOOL], "tool_choice": choice}
        answer = client.responses.parse(**ask)
        calls = [item for item in answer.output if item.type == "function_call"]
        assert calls and all(isinstance(call.parsed_arguments, Walk) for call in calls)
        for call in calls:
            jsonschema.validate(json.loads(call.arguments), TOOL["parameters"])
        with client.responses.stream(**ask) as stream:
            kinds = [event.type for event in stream]
            streamed = stream.get_final_response()
        assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
        assert kinds.count("response.function_call_arguments.done") == len(calls)
        assert [call.arguments for call in streamed.output] == [call.arguments for call in calls]
    results = [{"type": "function_call_output", "call_id": call.call_id, "output": "It was fun."} for call in calls]
    turns = [{"role": "user", "content": QUESTION}, *answer.output, *results]
    assert client.responses.create(**{**GREEDY, "input": turns}, tools=[TOOL]).output_text


def check_errors() -> None:
    for wrong, kind in (({"model": "gpt-4"}, openai.NotFoundError), ({"input": []}, openai.BadRequestError)):
        try:
            client.responses.create(**{**GREEDY, **wrong})
        except kind:
            continue
        raise AssertionError(f"not refused: {wrong}")


if __name__ == "__main__":
    check_text()
    check_turns()
    check_parse()
    check_calls()
    check_errors()
