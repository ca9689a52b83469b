"""instructor, unchanged: its modes that ask for JSON, partial answers and a second try.

Run by test_clients.py in an environment of its own: argv[1] is the server, argv[2] how to draw.
"""

from __future__ import annotations

import json
import sys
from typing import Any, Literal

import instructor
import openai
from instructor import Mode
from instructor.core import IncompleteOutputException, InstructorRetryException
from pydantic import BaseModel, ConfigDict, Field, field_validator

BASE_URL, WANTED = sys.argv[1], json.loads(sys.argv[2])
ASK: dict[str, Any] = {"model": "demo", "messages": WANTED["messages"], "seed": 1, "max_retries": 0, **WANTED["drawn"]}

server = openai.OpenAI(base_url=BASE_URL, api_key="none", max_retries=0, timeout=60)


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
    """What the modes that know no schema can promise of a model that tells stories."""


def ask(mode: Mode, kind: Any, **more: Any) -> Any:
    return instructor.from_openai(server, mode=mode).chat.completions.create(response_model=kind, **{**ASK, **more})


def check_modes_with_schema() -> None:
    pets = [ask(Mode.JSON_SCHEMA, Pet, seed=seed) for seed in (1, 2)]
    assert all(isinstance(pet, Pet) for pet in pets)
    assert pets[0] != pets[1]


def check_modes_without_schema() -> None:
    """The schema is in the prompt only. A bias ends the object at once; a regex is Markdown as a model writes it."""
    assert isinstance(ask(Mode.JSON, AnyObject, logit_bias=WANTED["ends_objects"]), AnyObject)
    fenced = {"structured_outputs": {"regex": '```json\n\\{"minutes": [1-9]\\}\n```'}}
    assert 1 <= ask(Mode.MD_JSON, Walk, extra_body=fenced).minutes <= 9


def check_streams() -> None:
    for mode in (Mode.JSON_SCHEMA,):
        client = instructor.from_openai(server, mode=mode)
        partial = list(client.chat.completions.create_partial(response_model=Pet, **ASK))
        assert partial[-1].model_dump() == client.chat.completions.create(response_model=Pet, **ASK).model_dump()
        assert len(partial) > 1


def check_second_try() -> None:
    """A validator refuses each first answer: the error goes back with the call, and the next answer is taken."""
    refused = []

    class Doubted(Walk):
        @field_validator("minutes")
        @classmethod
        def refuse_first(cls, minutes: int) -> int:
            if not refused:
                refused.append(minutes)
                raise ValueError("think again")
            return minutes

    for mode in (Mode.JSON_SCHEMA,):
        refused.clear()
        assert ask(mode, Doubted, max_retries=2).minutes and refused


def check_cut() -> None:
    for mode in (Mode.JSON_SCHEMA,):
        try:
            ask(mode, Pet, max_tokens=3)
        except (IncompleteOutputException, InstructorRetryException):
            continue
        raise AssertionError("three tokens were a whole pet")


if __name__ == "__main__":
    check_modes_with_schema()
    check_modes_without_schema()
    check_streams()
    check_second_try()
    check_cut()
