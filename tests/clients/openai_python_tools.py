"""openai-python, unchanged: answers of a given form, whole, streamed and parsed.

Run by test_clients.py in an environment of its own: argv[1] is the server, argv[2] how to draw.
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
SEEDS = range(3)

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
    toys: list[Toy] = Field(min_length=1, max_length=2)


SCHEMA = Pet.model_json_schema()
FORMAT = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA, "strict": True}}


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


if __name__ == "__main__":
    check_schema()
    check_parse()
    check_object()
    check_cut()
