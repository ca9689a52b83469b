"""instructor, unchanged: its modes for servers of OpenAI's API, lists, partial answers and a second try.

Run by test_clients.py in an environment of its own: argv[1] is the server, argv[2] how to draw. Its other modes
are older names of these (`FUNCTIONS`, `TOOLS_STRICT`, `JSON_O1`), for other providers, or for tools that OpenAI runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import instructor
import openai
from instructor import Mode
from instructor.core import IncompleteOutputException
from instructor.v2.core.registry import mode_registry
from pydantic import BaseModel, ConfigDict, Field, field_validator

BASE_URL, WANTED = sys.argv[1], json.loads(sys.argv[2])
EXTRA = {**WANTED["drawn"], "seed": 1}
ASK: dict[str, Any] = {
    "model": "demo",
    "messages": WANTED["messages"],
    "max_retries": 0,
    "max_tokens": EXTRA.pop("max_tokens"),
    "extra_body": EXTRA,
}

server = openai.OpenAI(base_url=BASE_URL, api_key="none", max_retries=0, timeout=60)

WITH_SCHEMA = (Mode.TOOLS, Mode.JSON_SCHEMA, Mode.RESPONSES_TOOLS)


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


def ask(mode: Mode, kind: Any, extra: Mapping[str, Any] | None = None, **more: Any) -> Any:
    body = {**ASK, "extra_body": {**EXTRA, **(extra or {})}, **more}
    return instructor.from_openai(server, mode=mode).chat.completions.create(response_model=kind, **body)


def check_modes() -> None:
    """These are all that instructor has for OpenAI's API."""
    assert {*WITH_SCHEMA, Mode.JSON, Mode.MD_JSON, Mode.PARALLEL_TOOLS} == {
        *mode_registry.get_modes_for_provider(instructor.Provider.OPENAI)
    }


def check_modes_with_schema() -> None:
    for mode in WITH_SCHEMA:
        pets = [ask(mode, Pet, {"seed": seed}) for seed in (1, 2)]
        assert all(isinstance(pet, Pet) for pet in pets)
        assert pets[0] != pets[1]
    assert isinstance(ask(Mode.TOOLS, Pet, strict=True), Pet)


def check_modes_without_schema() -> None:
    """The schema is in the prompt only. A bias ends the object at once; a regex is Markdown as a model writes it."""
    assert isinstance(ask(Mode.JSON, AnyObject, {"logit_bias": WANTED["ends_objects"]}), AnyObject)
    fenced = {"structured_outputs": {"regex": '```json\n\\{"minutes": [1-9]\\}\n```'}}
    assert 1 <= ask(Mode.MD_JSON, Walk, fenced).minutes <= 9


def check_parallel_tools() -> None:
    """It asks for `auto`, which extra_body overrules: a story teller calls only what it must."""
    found = list(ask(Mode.PARALLEL_TOOLS, Iterable[Pet | Walk], {"tool_choice": "required"}))
    assert found and all(isinstance(each, Pet | Walk) for each in found)


def check_streams() -> None:
    """Pets that grow; those of tools have another schema, whose fields may be missing, until the last."""
    for mode in WITH_SCHEMA:
        client = instructor.from_openai(server, mode=mode)
        partial = list(client.chat.completions.create_partial(response_model=Pet, **ASK))
        assert len(partial) > 1
        Pet.model_validate(partial[-1].model_dump())


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

    for mode in WITH_SCHEMA:
        refused.clear()
        assert ask(mode, Doubted, max_retries=2).minutes and refused


def check_cut() -> None:
    for mode in (Mode.TOOLS, Mode.JSON_SCHEMA):
        try:
            ask(mode, Pet, max_tokens=3)
        except IncompleteOutputException:
            continue
        raise AssertionError("three tokens were a whole pet")


if __name__ == "__main__":
    check_modes()
    check_modes_with_schema()
    check_modes_without_schema()
    check_parallel_tools()
    check_streams()
    check_second_try()
    check_cut()
