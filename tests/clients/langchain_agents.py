"""LangChain, unchanged: `with_structured_output`, and an agent whose answer has a form.

Run by test_clients.py in an environment of its own: argv[1] is the server, argv[2] how to draw.
"""

from __future__ import annotations

import json
import sys
from typing import Any, Literal

import jsonschema
from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, ConfigDict, Field

BASE_URL, WANTED = sys.argv[1], json.loads(sys.argv[2])
SERVER = {"base_url": BASE_URL, "api_key": "none", "model": "demo", "max_retries": 0, "timeout": 60}
(QUESTION,) = (message["content"] for message in WANTED["messages"])
MESSAGES = {"messages": [{"role": "user", "content": QUESTION}]}

chat = ChatOpenAI(**SERVER, **WANTED["drawn"], seed=1)


class Pet(BaseModel):
    """A pet of the story."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=12)
    kind: Literal["dog", "cat", "fox"]
    age: int = Field(ge=0, le=30)


class AnyObject(BaseModel):
    """What `json_mode`, which knows no schema, can promise."""


def check_structured_output() -> None:
    for strict in (True, None):
        found = chat.with_structured_output(Pet, method="json_schema", strict=strict, include_raw=True).invoke(QUESTION)
        assert isinstance(found["parsed"], Pet), found
    schema = {"title": "Pet", **Pet.model_json_schema()}
    found = chat.with_structured_output(schema, method="json_schema").invoke(QUESTION)
    jsonschema.validate(found, schema)
    ends = ChatOpenAI(**SERVER, **WANTED["drawn"], logit_bias=WANTED["ends_objects"])
    assert ends.with_structured_output(AnyObject, method="json_mode").invoke(QUESTION) == AnyObject()


def check_streamed_output() -> None:
    method = {"method": "json_schema", "strict": True}
    pieces = list(chat.with_structured_output(Pet.model_json_schema(), **method).stream(QUESTION))
    assert len(pieces) > 1  # objects that grow
    assert pieces[-1] == chat.with_structured_output(Pet.model_json_schema(), **method).invoke(QUESTION)


def check_agent_with_form() -> None:
    """An agent whose last answer has a form, by `response_format`."""
    agent = create_agent(chat, tools=[], response_format=ProviderStrategy(Pet))
    found: dict[str, Any] = agent.invoke(MESSAGES, {"recursion_limit": 8})
    assert isinstance(found["structured_response"], Pet), found


if __name__ == "__main__":
    check_structured_output()
    check_streamed_output()
    check_agent_with_form()
