"""LangChain, unchanged: `with_structured_output` by each of its methods, tools that a model binds, and agents.

Run by test_clients.py in an environment of its own: argv[1] is the server, argv[2] how to draw. The demo model calls
only what it must, so agents have a middleware that forces the first turn and not those after an answer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, Literal

import jsonschema
from langchain.agents import create_agent
from langchain.agents.middleware import ModelRequest, ModelResponse, wrap_model_call
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, ConfigDict, Field

BASE_URL, WANTED = sys.argv[1], json.loads(sys.argv[2])
SERVER = {"base_url": BASE_URL, "api_key": "none", "model": "demo", "max_retries": 0, "timeout": 60}
(QUESTION,) = (message["content"] for message in WANTED["messages"])
MESSAGES = {"messages": [{"role": "user", "content": QUESTION}]}

EXTRA = {**WANTED["drawn"], "seed": 1}
MAX_TOKENS = EXTRA.pop("max_tokens")


def chat(responses: bool, **extra: Any) -> ChatOpenAI:
    """The model by chat completions or by the Responses API."""
    return ChatOpenAI(**SERVER, use_responses_api=responses, max_tokens=MAX_TOKENS, extra_body={**EXTRA, **extra})


class Pet(BaseModel):
    """A pet of the story."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=12)
    kind: Literal["dog", "cat", "fox"]
    age: int = Field(ge=0, le=30)


class AnyObject(BaseModel):
    """What `json_mode`, which knows no schema, can promise."""


@tool
def walk(pet: Literal["dog", "cat", "fox"], at_night: bool) -> str:
    """Take a pet for a walk."""
    return f"The {pet} had a lot of fun in the {'dark' if at_night else 'sun'}."


@wrap_model_call
def force_first_turn(request: ModelRequest, handler: Callable[[ModelRequest], ModelResponse]) -> ModelResponse:
    answered = any(isinstance(message, ToolMessage) for message in request.messages)
    choice = "auto" if answered else "required"
    return handler(request.override(tool_choice=choice, model_settings={"strict": True}))


def check_structured_output() -> None:
    for responses in (False, True):
        for method, strict in (("json_schema", True), ("function_calling", None)):
            form = chat(responses).with_structured_output(Pet, method=method, strict=strict, include_raw=True)
            found = form.invoke(QUESTION)
            assert isinstance(found["parsed"], Pet), found
    ends = chat(False, logit_bias=WANTED["ends_objects"])
    assert ends.with_structured_output(AnyObject, method="json_mode").invoke(QUESTION) == AnyObject()


def check_streamed_output() -> None:
    """Objects that grow, the last of which is what a whole answer has."""
    schema = {"title": "Pet", **Pet.model_json_schema()}
    form = chat(False).with_structured_output(schema, method="json_schema", strict=True)
    pieces = list(form.stream(QUESTION))
    assert len(pieces) > 1
    assert pieces[-1] == form.invoke(QUESTION)
    jsonschema.validate(pieces[-1], schema)


def check_bound_tools() -> None:
    for responses, choice in ((False, "any"), (False, "walk"), (True, "any")):
        bound = chat(responses).bind_tools([walk], tool_choice=choice, strict=True)
        answer = bound.invoke(QUESTION)
        assert answer.tool_calls and not answer.invalid_tool_calls, answer
        for call in answer.tool_calls:
            jsonschema.validate(call["args"], walk.args_schema.model_json_schema())
        pieces = list(bound.stream(QUESTION))
        whole = pieces[0]
        for piece in pieces[1:]:
            whole += piece
        assert [(call["name"], call["args"]) for call in whole.tool_calls] == [
            (call["name"], call["args"]) for call in answer.tool_calls
        ]


def check_agent() -> None:
    """It calls the tool, sends its answer, and ends with text: a sentence."""
    for responses in (False, True):
        model = chat(responses, stop=["."])
        agent = create_agent(model, tools=[walk], system_prompt="Tell stories.", middleware=[force_first_turn])
        messages = agent.invoke(MESSAGES, {"recursion_limit": 8})["messages"]
        calls = [call for message in messages if isinstance(message, AIMessage) for call in message.tool_calls]
        answers = [message for message in messages if isinstance(message, ToolMessage)]
        assert calls and [answer.tool_call_id for answer in answers] == [call["id"] for call in calls]
        assert all(answer.status == "success" and "a lot of fun" in answer.content for answer in answers)
        assert isinstance(messages[-1], AIMessage) and messages[-1].text


def check_agent_with_form() -> None:
    """Agents whose last answer has a form: by a tool that they must call, and by `response_format`."""
    for strategy in (ToolStrategy(Pet), ProviderStrategy(Pet)):
        agent = create_agent(chat(False), tools=[], response_format=strategy)
        found: dict[str, Any] = agent.invoke(MESSAGES, {"recursion_limit": 8})
        assert isinstance(found["structured_response"], Pet), found


if __name__ == "__main__":
    check_structured_output()
    check_streamed_output()
    check_bound_tools()
    check_agent()
    check_agent_with_form()
