"""Answers, chunks and errors against OpenAI's own description of its API, over a grid of parameters.

The description is read from shared/data/api beside the repository, or the file that BATON_TEST_OPENAPI names; without
it these tests skip. The app runs in process, over an engine that replays scripts.
"""

from __future__ import annotations

import itertools
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from baton.node.errors import BatonError, DeadlineExceeded, InvariantBroken, Overloaded, PeerLost
from baton.node.messages.control import Logprob, PromptLogprob
from baton.proxy.interface import Delta
from baton.proxy.text.model_text import ModelText
from baton.testing.fake_engine import EngineCall, FakeEngine, ScriptStep

BESIDE = Path(__file__).resolve().parents[5] / "shared" / "data" / "api" / "openai-openapi.yaml"
DESCRIPTION = Path(os.environ.get("BATON_TEST_OPENAPI", BESIDE))
ANSWER = 'Once, a "quote", 日本 é 👩‍👧.'
CHAT: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION: dict[str, Any] = {"model": "demo", "prompt": "Hi"}
IDS: dict[str, Any] = {"return_token_ids": True, "return_tokens_as_token_ids": True}
USAGE: tuple[dict[str, Any], ...] = (
    {},
    {"stream_options": {"include_usage": True}},
    {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
)

COMPLETION_GRID: tuple[tuple[dict[str, Any], ...], ...] = (
    ({}, {"logprobs": 0}, {"logprobs": 5}),
    ({}, {"n": 3}, {"n": 2, "prompt": ["Hi", "Hi there"]}, {"prompt": [17, 18]}),
    ({}, {"stop": ["quo"]}, {"max_tokens": 3}, {"echo": True}),
    ({}, IDS),
)
CHAT_GRID: tuple[tuple[dict[str, Any], ...], ...] = (
    ({}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 5}),
    ({}, {"n": 3}),
    ({}, {"stop": ["quo"]}, {"max_tokens": 3}, {"stop": ["quo"], "include_stop_str_in_output": True}),
    ({}, IDS),
)
RESPONSE: dict[str, Any] = {"model": "demo", "input": "Hi"}
RESPONSE_GRID: tuple[tuple[dict[str, Any], ...], ...] = (
    ({}, {"include": ["message.output_text.logprobs"], "top_logprobs": 5}),
    ({}, {"stop": ["quo"]}, {"max_output_tokens": 3}, {"max_output_tokens": 100}),
    (
        {},
        {
            "instructions": "Be brief.",
            "metadata": {"a": "b"},
            "reasoning": {"summary": "auto"},
            "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}},
        },
    ),
)
REFUSED: dict[str, tuple[str, bytes]] = {
    "no json": ("/v1/completions", b"{"),
    "no model": ("/v1/completions", b"{}"),
    "no messages": ("/v1/chat/completions", json.dumps({"model": "demo"}).encode()),
    "another model": ("/v1/chat/completions", json.dumps({**CHAT, "model": "gpt-4"}).encode()),
    "a value out of range": ("/v1/completions", json.dumps({**COMPLETION, "temperature": -1}).encode()),
    "a part that is no text": (
        "/v1/chat/completions",
        json.dumps({**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}).encode(),
    ),
    "a prompt that is too long": ("/v1/completions", json.dumps({**COMPLETION, "max_tokens": 100_000}).encode()),
    "a near miss of a parameter": ("/v1/completions", json.dumps({**COMPLETION, "temprature": 1}).encode()),
    "a path that is not served": ("/v1/nothing", b"{}"),
    "an answer that is not kept": ("/v1/responses", json.dumps({**RESPONSE, "previous_response_id": "r"}).encode()),
}
FAILURES: tuple[BatonError, ...] = (
    Overloaded("the queue is full"),
    PeerLost("no worker"),
    DeadlineExceeded("too late"),
    InvariantBroken("a bug"),
)


class Schemas:
    """Validators of the description's components, by name."""

    def __init__(self, document: dict[str, Any]) -> None:
        resource = Resource.from_contents(nullable(document), default_specification=DRAFT202012)
        self.of_event = {
            schema["properties"]["type"]["enum"][0]: name
            for name, schema in document["components"]["schemas"].items()
            if name.startswith("Response") and name.endswith("Event") and "type" in schema.get("properties", ())
        }
        """Components by the type of the event that they describe."""
        self._registry: Registry[Any] = Registry().with_resource("urn:openai", resource)

    def check(self, name: str, instance: Any) -> None:
        schema = {"$ref": f"urn:openai#/components/schemas/{name}"}
        errors = list(Draft202012Validator(schema, registry=self._registry).iter_errors(instance))
        assert not errors, [f"{error.json_path}: {error.message}" for error in errors]


def nullable(node: Any) -> Any:
    """OpenAPI 3.0's `nullable`, which the description still uses in places, as JSON Schema writes it."""
    if isinstance(node, list):
        return [nullable(entry) for entry in node]
    if not isinstance(node, dict):
        return node
    made = {key: nullable(value) for key, value in node.items() if key != "nullable"}
    return {"anyOf": [made, {"type": "null"}]} if node.get("nullable") is True else made


def combinations(grid: tuple[tuple[dict[str, Any], ...], ...]) -> Iterator[dict[str, Any]]:
    """Every choice of one part a row."""
    for parts in itertools.product(*grid):
        yield {name: value for part in parts for name, value in part.items()}


def without_nulls(completion: dict[str, Any]) -> dict[str, Any]:
    """A completion, or a chunk, without the nulls of OpenAI's own that its description leaves out: log probabilities of
    the first token of an echoed prompt and, in a chunk, the reason to finish and the usage before the end."""
    kept = {name: value for name, value in completion.items() if name != "usage" or value is not None}
    return {**kept, "choices": [_choice_without_nulls(choice) for choice in completion["choices"]]}


def _choice_without_nulls(choice: dict[str, Any]) -> dict[str, Any]:
    made = {**choice, "finish_reason": "stop" if choice["finish_reason"] is None else choice["finish_reason"]}
    if choice["logprobs"] is not None and choice["logprobs"]["token_logprobs"][:1] == [None]:
        lists = choice["logprobs"]
        made["logprobs"] = lists | {name: lists[name][1:] for name in ("token_logprobs", "top_logprobs")}
    return made


@pytest.fixture(scope="module")
def schemas() -> Schemas:
    if not DESCRIPTION.is_file():
        reason = f"no description of OpenAI's API at {DESCRIPTION}"
        warnings.warn(f"answers are not validated: {reason}", stacklevel=1)
        pytest.skip(reason)
    return Schemas(yaml.load(DESCRIPTION.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


@pytest.fixture
def engine(text: ModelText) -> FakeEngine:
    """Answers token by token, ended by the model or by max_tokens; one token cannot be drawn, as a mask may make it."""
    ids = (*text.encode(ANSWER, add_special_tokens=False), text.eos_ids[-1])

    def script(call: EngineCall) -> list[ScriptStep]:
        top = ((ids[0], -0.25), (ids[1], float("-inf")), (5, -1.0), (6, -2.0), (7, -3.0))[: call.sampling.top_logprobs]
        logprobs = (Logprob(-0.5, top),) if call.sampling.logprobs else ()
        limit = call.sampling.max_tokens
        shown = ids[:limit]
        ends = ["" for _ in shown[:-1]] + ["length" if len(ids) > limit else "stop"]
        answer: list[ScriptStep] = [Delta((token,), logprobs, end, 1) for token, end in zip(shown, ends, strict=True)]
        if (wanted := call.sampling.prompt_logprobs) is None:
            return answer
        entry = PromptLogprob(-0.75, 3, ((ids[0], -0.5), (ids[1], float("-inf")), (5, -1.0))[:wanted])
        return [Delta((), prompt_logprobs=(entry,) * (len(call.prompt_ids) - 1)), *answer]

    return FakeEngine(script)


async def ask(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, (body, answer.text)
    return dict(answer.json())


async def ask_stream(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = await client.post(path, json={**body, "stream": True})
    assert answer.status_code == 200, (body, answer.text)
    *parts, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(part.removeprefix("data: ")) for part in parts]


async def test_completions(client: httpx.AsyncClient, schemas: Schemas) -> None:
    """Guards against an answer of /v1/completions that a client generated from the description cannot read."""
    for body in combinations(COMPLETION_GRID):
        answer = await ask(client, "/v1/completions", COMPLETION | body)
        assert all(choice["finish_reason"] for choice in answer["choices"])
        schemas.check("CreateCompletionResponse", without_nulls(answer))


async def test_streamed_completions(client: httpx.AsyncClient, schemas: Schemas) -> None:
    """Guards the chunks in the same way."""
    for body in combinations((*COMPLETION_GRID, USAGE)):
        for chunk in await ask_stream(client, "/v1/completions", COMPLETION | body):
            schemas.check("CreateCompletionResponse", without_nulls(chunk))


async def test_chats(client: httpx.AsyncClient, schemas: Schemas) -> None:
    """Guards against an answer of /v1/chat/completions that a client generated from the description cannot read."""
    for body in combinations(CHAT_GRID):
        schemas.check("CreateChatCompletionResponse", await ask(client, "/v1/chat/completions", CHAT | body))


async def test_streamed_chats(client: httpx.AsyncClient, schemas: Schemas) -> None:
    """Guards the chunks in the same way."""
    for body in combinations((*CHAT_GRID, USAGE)):
        for chunk in await ask_stream(client, "/v1/chat/completions", CHAT | body):
            schemas.check("CreateChatCompletionStreamResponse", chunk)


async def test_responses(client: httpx.AsyncClient, schemas: Schemas) -> None:
    """Guards the answers of /v1/responses and their events in the same way."""
    for body in combinations(RESPONSE_GRID):
        schemas.check("Response", _without_null_usage(await ask(client, "/v1/responses", RESPONSE | body)))
        answer = await client.post("/v1/responses", json={**RESPONSE, **body, "stream": True})
        for event in (json.loads(part.partition("data: ")[2]) for part in answer.text.split("\n\n") if part):
            if "response" in event:
                event["response"] = _without_null_usage(event["response"])
            schemas.check(schemas.of_event[event["type"]], event)


def _without_null_usage(response: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's examples have these nulls, and its description leaves them out."""
    return {name: value for name, value in response.items() if name not in ("usage", "user") or value is not None}


async def test_models(client: httpx.AsyncClient, schemas: Schemas) -> None:
    """Guards the list of models, and one of them."""
    schemas.check("ListModelsResponse", (await client.get("/v1/models")).json())
    schemas.check("Model", (await client.get("/v1/models/demo")).json())
    schemas.check("ErrorResponse", (await client.get("/v1/models/gpt-4")).json())


@pytest.mark.parametrize("case", REFUSED)
async def test_refusals(client: httpx.AsyncClient, schemas: Schemas, case: str) -> None:
    """Guards the body of an error, in which clients look for its code and parameter."""
    path, body = REFUSED[case]
    answer = await client.post(path, content=body)
    assert 400 <= answer.status_code < 500, answer.text
    schemas.check("ErrorResponse", answer.json())


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
async def test_failures(
    client: httpx.AsyncClient, engine: FakeEngine, schemas: Schemas, failure: BatonError, path: str
) -> None:
    """Guards errors of the engine: before the first token as a response, after it as an event of the stream."""
    body = CHAT if "chat" in path else COMPLETION
    engine.script = lambda call: [failure]
    answer = await client.post(path, json=body)
    assert answer.status_code >= 500 or answer.status_code == 429, answer.text
    schemas.check("ErrorResponse", answer.json())
    engine.script = lambda call: [Delta((17,), (), "", 0), failure]
    streamed = await client.post(path, json={**body, "stream": True})
    events = [json.loads(part[6:]) for part in streamed.text.split("\n\n") if part not in ("", "data: [DONE]")]
    schemas.check("ErrorResponse", events[-1])
