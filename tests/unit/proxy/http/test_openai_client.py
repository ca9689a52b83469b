"""The `openai` package, unchanged, against the app in a real server on a free port of the loopback interface."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import openai
import pytest
import uvicorn

from baton.node.errors import BadRequest, DeadlineExceeded, Overloaded, PeerLost
from baton.proxy.http.app import create_app
from baton.proxy.interface import AppSettings, Delta
from baton.proxy.text.model_text import ModelText
from baton.testing.fake_engine import EngineCall, FakeEngine, ScriptStep

Says = Callable[..., Callable[[EngineCall], list[ScriptStep]]]
ANSWER = "Once upon a time 日本 there was."
USER: Any = [{"role": "user", "content": "Tell me a story"}]


class Server(uvicorn.Server):
    """Sets an event when it serves, so that tests need not poll."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.serving = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.serving.set()


@dataclass
class Served:
    address: tuple[str, int]
    engine: FakeEngine
    gone: threading.Event = field(default_factory=threading.Event)
    """Set when a generation is cancelled."""

    @property
    def url(self) -> str:
        return f"http://{self.address[0]}:{self.address[1]}/v1"


@pytest.fixture(scope="module")
def server(text: ModelText) -> Iterator[Served]:
    engine = FakeEngine(lambda call: [])
    # The text is the session's: the server must not run the app's end, which closes it.
    app = create_app(engine, {"demo": text}, AppSettings(api_keys=("key",)))
    bound = socket.create_server(("127.0.0.1", 0))
    running = Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    assert running.serving.wait(60)
    made = Served(bound.getsockname(), engine)
    engine.on_cancel = lambda _: made.gone.set()
    yield made
    running.should_exit = True
    thread.join(60)
    bound.close()


@pytest.fixture
def served(server: Served, says: Says) -> Served:
    server.engine.script = says(ANSWER, cached_tokens=2)
    server.engine.calls.clear()
    server.engine.cancelled.clear()
    server.gone.clear()
    return server


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.url, api_key="key", max_retries=0, timeout=60) as made:
        yield made


def test_completion(client: openai.OpenAI) -> None:
    """Guards against a body that the client's types cannot read."""
    answer = client.completions.create(model="demo", prompt="Hi", max_tokens=50)
    assert answer.choices[0].text == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 2
    assert answer.usage.completion_tokens > 0
    assert answer._request_id == answer.id


def test_completion_batches_choices_and_echo(client: openai.OpenAI) -> None:
    """Guards against batches of texts or ids, n, and echo differing from OpenAI's."""
    answer = client.completions.create(model="demo", prompt=["one", "two"], n=3, echo=True, seed=7)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == ["one" + ANSWER] * 3 + ["two" + ANSWER] * 3
    assert len(client.completions.create(model="demo", prompt=[[5, 6], [7]]).choices) == 2


def test_completion_stream_with_logprobs_and_usage(client: openai.OpenAI) -> None:
    """Guards against chunks that the client drops, and a stream that does not end."""
    stream = client.completions.create(
        model="demo", prompt="Hi", stream=True, logprobs=1, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == ANSWER
    logprobs = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices]
    assert all(
        part is not None and part.tokens and len(part.tokens) == len(part.token_logprobs or []) for part in logprobs
    )
    assert chunks[-1].usage is not None and chunks[-1].usage.prompt_tokens_details is not None
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


def test_chat(client: openai.OpenAI) -> None:
    """Guards against n, logprobs or the message differing from OpenAI's."""
    answer = client.chat.completions.create(
        model="demo", messages=USER, n=3, logprobs=True, top_logprobs=2, user="me", store=False
    )
    assert [choice.message.content for choice in answer.choices] == [ANSWER] * 3
    assert answer.choices[0].message.role == "assistant"
    content = answer.choices[2].logprobs and answer.choices[2].logprobs.content
    assert content and len(content[0].top_logprobs) == 2
    assert answer.usage and answer.usage.completion_tokens == 3 * len(content)


def test_chat_stream(client: openai.OpenAI) -> None:
    """Guards against the role, text, finish or usage of a stream lost; the SDK's own accumulator reads it."""
    with client.chat.completions.stream(
        model="demo", messages=USER, stream_options={"include_usage": True}, stop=["was"], max_completion_tokens=40
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == ANSWER.removesuffix("was.")
    assert final.choices[0].finish_reason == "stop"
    assert final.usage and final.usage.total_tokens == final.usage.prompt_tokens + final.usage.completion_tokens


def test_extra_parameters_reach_the_engine(client: openai.OpenAI, served: Served) -> None:
    """Guards against vLLM's parameters, which clients send as `extra_body`, being refused."""
    more = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True, "priority": 3, "min_tokens": 2}
    client.chat.completions.create(model="demo", messages=USER, extra_body=more, logit_bias={"50": -1}, seed=3)
    (call,) = served.engine.calls
    assert (call.sampling.top_k, call.sampling.min_p, call.sampling.min_tokens, call.generation.priority) == (
        5,
        0.1,
        2,
        -3,
    )
    assert (call.sampling.stop_token_ids, call.sampling.logit_bias, call.sampling.seed) == ((), ((50, -1.0),), 3)


def test_models(client: openai.OpenAI) -> None:
    """Guards against a list that the client cannot page through."""
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"


@pytest.mark.parametrize(
    ("error", "expected", "code"),
    [
        (BadRequest("bad", code="odd"), openai.BadRequestError, "odd"),
        (Overloaded("full", retry_after_s=3), openai.RateLimitError, "rate_limit_exceeded"),
        (PeerLost("none left"), openai.InternalServerError, "service_unavailable"),
        (DeadlineExceeded("late"), openai.InternalServerError, "timeout"),
        (RuntimeError("oops"), openai.InternalServerError, "internal_error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
@pytest.mark.parametrize("stream", [False, True])
def test_failures_are_the_clients_own_exceptions(
    client: openai.OpenAI,
    served: Served,
    error: Exception,
    expected: type[openai.APIStatusError],
    code: str,
    stream: bool,
) -> None:
    """Guards against a failure that the client's users cannot catch by its class and code."""
    served.engine.script = lambda call: [error]
    with pytest.raises(expected) as raised:
        client.chat.completions.create(model="demo", messages=USER, stream=stream)
    assert raised.value.code == code


def test_a_failure_in_mid_stream_raises(client: openai.OpenAI, served: Served) -> None:
    """Guards against a broken stream that ends like a complete one."""
    served.engine.script = lambda call: [Delta((300,)), PeerLost("worker lost")]
    text = ""
    with pytest.raises(openai.APIError, match="worker lost"):
        for chunk in client.completions.create(model="demo", prompt="Hi", stream=True):
            text += chunk.choices[0].text
    assert text


def test_requests_that_are_refused(client: openai.OpenAI, served: Served) -> None:
    """Guards against a status that the client maps to another exception."""
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-9", prompt="Hi")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="demo", prompt="word " * 100_000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.APIStatusError) as large:
        client.completions.create(model="demo", prompt="x" * (12 << 20))
    assert large.value.status_code == 413
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="other").models.list()
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(model="demo", messages=USER, verbosity="high")
    assert tools.value.param == "verbosity"
    assert served.engine.calls == []


def test_a_client_that_closes_its_connection_cancels(client: openai.OpenAI, served: Served) -> None:
    """Guards against a disconnect that only the next write would notice: here nothing is ever written again."""
    served.engine.script = lambda call: [Delta((300,)), asyncio.Event()]
    stream = client.chat.completions.create(model="demo", messages=USER, stream=True)
    next(iter(stream))
    stream.close()
    assert served.gone.wait(60)
    assert len(served.engine.cancelled) == 1


def test_a_client_that_gives_up_waiting_cancels(served: Served) -> None:
    """Guards against an answer computed to its end for a client that closed its connection while waiting for it."""
    begun = threading.Event()

    def script(call: EngineCall) -> list[ScriptStep]:
        begun.set()
        return [asyncio.Event()]

    served.engine.script = script
    connection = http.client.HTTPConnection(*served.address, timeout=60)
    body = json.dumps({"model": "demo", "prompt": "Hi"})
    connection.request("POST", "/v1/completions", body, {"Authorization": "Bearer key"})
    assert begun.wait(60)
    connection.close()
    assert served.gone.wait(60)


async def test_many_streams_at_once(served: Served) -> None:
    """Guards against answers mixed up between connections."""
    async with openai.AsyncOpenAI(base_url=served.url, api_key="key", max_retries=0, timeout=60) as client:

        async def ask(prompt: str) -> str:
            stream = await client.completions.create(model="demo", prompt=prompt, stream=True, echo=True)
            return "".join([chunk.choices[0].text async for chunk in stream])

        prompts = [f"prompt {k}: " for k in range(16)]
        assert await asyncio.gather(*map(ask, prompts)) == [prompt + ANSWER for prompt in prompts]
