"""The app over a scripted engine, without a socket: routes, streams, failures, keys, clients that go away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from baton.kvtransfer.blocks.hashing import cache_salt
from baton.node.errors import (
    BadRequest,
    BatonError,
    DeadlineExceeded,
    InvariantBroken,
    Overloaded,
    PeerLost,
    TransferFailed,
)
from baton.node.messages.control import Logprob
from baton.proxy.http.app import create_app
from baton.proxy.http.bodies import BodyMemory, read_body
from baton.proxy.http.service import RequestLimit
from baton.proxy.interface import AppSettings, Delta
from baton.proxy.text.model_text import ModelText
from baton.testing.fake_engine import EngineCall, FakeEngine, ScriptStep

Says = Callable[..., Callable[[EngineCall], list[ScriptStep]]]
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION = {"model": "demo", "prompt": "Hi"}


def events(answer: httpx.Response) -> list[Any]:
    """The data of each event; the last of a complete stream is "[DONE]"."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    *parts, rest = answer.text.split("\n\n")
    assert rest == "", "every event must end with an empty line"
    assert all(part.startswith("data: ") and "\n" not in part for part in parts)
    return [part[6:] if part == "data: [DONE]" else json.loads(part[6:]) for part in parts]


# ---- answers ------------------------------------------------------------------------------------------------------


async def test_a_completion(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """Guards against a shape that OpenAI's clients do not read, and an end token shown as text."""
    answer = await client.post("/v1/completions", json=COMPLETION)
    made = answer.json()
    assert (answer.status_code, made["object"], made["model"]) == (200, "text_completion", "demo")
    assert made["choices"] == [{"index": 0, "text": "Once upon a time.", "logprobs": None, "finish_reason": "stop"}]
    assert made["id"] == answer.headers["x-request-id"]
    assert [call.request_id for call in engine.calls] == [made["id"] + "-0"]
    usage = made["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens"] == len(engine.calls[0].prompt_ids)


async def test_no_two_generations_have_one_id(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """Guards workers of several proxies, which know a request by its id, against ids that a client chooses."""
    for _ in range(2):
        await client.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "mine"})
        assert (await client.get("/health_generate")).status_code == 200
    ids = [call.request_id for call in engine.calls]
    assert len(set(ids)) == len(ids) == 4 and not any("mine" in request_id for request_id in ids)


async def test_a_clients_id_names_its_request(client: httpx.AsyncClient) -> None:
    """Guards against a request that cannot be found again by the id that its client, or a gateway, gave it."""
    for sent in ("mine", "a/b c~", "x" * 96):
        answer = await client.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": sent})
        assert answer.headers["x-request-id"] == sent
        assert answer.json()["id"] == f"chatcmpl-{sent}"
        refused = await client.post("/v1/chat/completions", json={}, headers={"x-request-id": sent})
        assert (refused.status_code, refused.headers["x-request-id"]) == (400, sent)
    for sent in ("", "x" * 97, b"\xe9", b"a\tb"):
        answer = await client.post("/v1/chat/completions", json=CHAT, headers=[(b"x-request-id", sent)])
        assert answer.headers["x-request-id"] == answer.json()["id"] and len(answer.json()["id"]) == 41


async def test_one_id_twice_at_once_is_a_conflict(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """Guards against work done twice for a request that a gateway repeats, and an id that stays taken."""
    begun, go_on = asyncio.Event(), asyncio.Event()

    def script(call: EngineCall) -> list[ScriptStep]:
        begun.set()
        return [go_on, Delta((300,), (), "length")]

    engine.script = script
    headers = {"x-request-id": "mine"}
    first = asyncio.create_task(client.post("/v1/completions", json=COMPLETION, headers=headers))
    await begun.wait()
    second = await client.post("/v1/completions", json=COMPLETION, headers=headers)
    assert (second.status_code, second.json()["error"]["code"]) == (409, "request_in_progress")
    go_on.set()
    assert (await first).status_code == 200
    assert (await client.post("/v1/completions", json=COMPLETION, headers=headers)).status_code == 200


async def test_a_chat_stream(client: httpx.AsyncClient) -> None:
    """Guards against a first event without the role, a usage that was not asked for, and a missing [DONE]."""
    answer = await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
    *chunks, done = events(answer)
    assert done == "[DONE]"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "Once upon a time."
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert all("usage" not in chunk and chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_usage_in_every_chunk(client: httpx.AsyncClient, path: str) -> None:
    """Guards continuous_usage_stats, by which load generators count tokens while an answer streams."""
    body = {**(CHAT if "chat" in path else COMPLETION), "stream": True}
    options = {"include_usage": True, "continuous_usage_stats": True}
    answer = await client.post(path, json={**body, "stream_options": options})
    *chunks, last, _ = events(answer)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk["usage"]]
    assert counts == list(range(counts[0], counts[0] + len(counts))) and len(counts) >= len(chunks) - 1
    assert counts[-1] == last["usage"]["completion_tokens"]
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks if chunk["usage"]} == {last["usage"]["prompt_tokens"]}
    only = await client.post(path, json={**body, "stream_options": {"continuous_usage_stats": True}})
    assert all("usage" not in chunk for chunk in events(only)[:-1])


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_usage_in_a_stream(client: httpx.AsyncClient, engine: FakeEngine, says: Says, path: str) -> None:
    """Guards against usage missing, sent twice, or without the tokens that a cache had."""
    engine.script = says("Once upon a time.", cached_tokens=1)
    base = CHAT if "chat" in path else COMPLETION
    whole = (await client.post(path, json=base)).json()["usage"]
    answer = await client.post(path, json={**base, "stream": True, "stream_options": {"include_usage": True}})
    *chunks, last, _ = events(answer)
    assert last["choices"] == []
    assert last["usage"] == whole
    assert whole["prompt_tokens_details"] == {"cached_tokens": 1}
    assert all(chunk["usage"] is None for chunk in chunks)


async def test_a_stream_and_a_whole_answer_have_the_same_text(
    client: httpx.AsyncClient, engine: FakeEngine, says: Says
) -> None:
    """Guards against characters of several tokens, or text held for a stop string, treated differently."""
    engine.script = says("日本語 é 👩‍👩‍👧 the E and the END of it")
    for stop, expected in (
        ([], "日本語 é 👩‍👩‍👧 the E and the END of it"),
        (["END", "👧👧"], "日本語 é 👩‍👩‍👧 the E and the "),
    ):
        asked = {**COMPLETION, "stop": stop, "echo": True, "prompt": "Hi: "}
        whole = (await client.post("/v1/completions", json=asked)).json()["choices"][0]
        chunks = events(await client.post("/v1/completions", json={**asked, "stream": True}))[:-1]
        streamed = [chunk["choices"][0]["text"] for chunk in chunks]
        assert "".join(streamed) == whole["text"] == "Hi: " + expected
        assert not any("\ufffd" in text for text in streamed)


async def test_choices_and_prompts_run_at_once_and_keep_their_order(
    client: httpx.AsyncClient, engine: FakeEngine, says: Says
) -> None:
    """Guards against choices one after the other, choices mixed up, and a prompt counted once for each answer."""
    every = asyncio.Event()

    def script(call: EngineCall) -> list[ScriptStep]:
        if len(engine.calls) == 4:
            every.set()
        return [every, *says(f"answer {call.request_id.rsplit('-', 1)[1]}")(call)]

    engine.script = script
    answer = (await client.post("/v1/completions", json={**COMPLETION, "prompt": ["Hi", "Hi there"], "n": 2})).json()
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [(k, f"answer {k}") for k in range(4)]
    prompts = {call.request_id[-1]: call.prompt_ids for call in engine.calls}
    assert answer["usage"]["prompt_tokens"] == len(prompts["0"]) + len(prompts["2"])
    assert len({call.sampling.seed for call in engine.calls}) == 4


async def test_generations_of_one_request_wait_for_one_another(
    engine: FakeEngine, text: ModelText, app_settings: AppSettings
) -> None:
    """Guards against a request that fills the queue by itself and is refused at every retry (429) on an idle server."""
    most, three_run = 0, asyncio.Event()

    def script(call: EngineCall) -> list[ScriptStep]:
        nonlocal most
        most = max(most, len(engine.running))
        if most == 3:
            three_run.set()
        return [three_run, Delta((300,), (), "length")]

    engine.script = script
    app = create_app(engine, {"demo": text}, replace(app_settings, max_generations=3))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://proxy") as client:
        answer = await asyncio.wait_for(
            client.post("/v1/completions", json={**COMPLETION, "prompt": ["a", "b", "c", "d"], "n": 2}), timeout=30
        )
    assert [choice["index"] for choice in answer.json()["choices"]] == list(range(8))
    assert most == 3
    assert [call.generation.follows for call in engine.calls] == [False] * 3 + [True] * 5


async def test_a_stop_string_cancels_the_engine(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """Guards against a worker that generates after the stop, and against tokens counted after it."""
    answer = (await client.post("/v1/completions", json={**COMPLETION, "stop": " a"})).json()
    assert answer["choices"][0]["text"] == "Once upon"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 3
    assert engine.cancelled == [answer["id"] + "-0"]


async def test_a_stop_string_may_stay_and_waits_for_min_tokens(client: httpx.AsyncClient) -> None:
    """Guards against include_stop_str_in_output and min_tokens being ignored for strings."""
    asked = {**COMPLETION, "stop": ["upon", "time"], "include_stop_str_in_output": True}
    assert (await client.post("/v1/completions", json=asked)).json()["choices"][0]["text"] == "Once upon"
    asked["min_tokens"] = 3
    assert (await client.post("/v1/completions", json=asked)).json()["choices"][0]["text"] == "Once upon a time"


@pytest.mark.parametrize("min_tokens", [0, 1, 2, 3])
async def test_a_stop_string_may_begin_before_min_tokens(client: httpx.AsyncClient, min_tokens: int) -> None:
    """Guards against an answer that runs on because its stop string lies across the border of min_tokens."""
    asked = {**COMPLETION, "stop": "upon a", "min_tokens": min_tokens}
    answer = (await client.post("/v1/completions", json=asked)).json()
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("Once ", "stop", "upon a")
    assert answer["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    ("stop", "include", "expected"),
    [
        ("<|user|>", False, "Once upon"),
        ("upon<|user|>", False, "Once "),
        ("<|user|>", True, "Once upon<|user|>"),
        ("<|user|>!", False, "Once upon a time."),
    ],
)
async def test_a_stop_string_may_be_a_special_token(
    client: httpx.AsyncClient, engine: FakeEngine, text: ModelText, stop: str, include: bool, expected: str
) -> None:
    """Guards against an answer that runs on past the special token at which its client wants it to end."""
    ids = text.encode("Once upon<|user|> a time.", add_special_tokens=False)
    engine.script = lambda call: [*(Delta((token,)) for token in ids[:-1]), Delta(ids[-1:], (), "length")]
    asked = {**COMPLETION, "stop": [stop], "include_stop_str_in_output": include}
    choice = (await client.post("/v1/completions", json=asked)).json()["choices"][0]
    assert choice["text"] == expected
    assert (choice["finish_reason"], choice.get("stop_reason")) == (
        ("length", None) if stop.endswith("!") else ("stop", stop)
    )


@pytest.mark.parametrize(("include", "expected"), [(False, "Once upon"), (True, "Once upon a")])
async def test_a_stop_token_is_text_only_where_asked_for(
    client: httpx.AsyncClient, engine: FakeEngine, text: ModelText, include: bool, expected: str
) -> None:
    """Guards against an ordinary token that the client named as a stop token shown, as vLLM does not."""
    ids = text.encode("Once upon a", add_special_tokens=False)
    engine.script = lambda call: [Delta(ids, (), "stop")]
    asked = {**COMPLETION, "stop_token_ids": [ids[-1]], "include_stop_str_in_output": include}
    answer = (await client.post("/v1/completions", json=asked)).json()
    assert answer["choices"][0]["text"] == expected
    assert answer["choices"][0]["stop_reason"] == ids[-1]
    assert answer["usage"]["completion_tokens"] == 3


async def test_one_delta_of_many_tokens(client: httpx.AsyncClient, engine: FakeEngine, text: ModelText) -> None:
    """Guards against text after a stop string, or tokens of it counted, where a delta brings several at once."""
    ids = text.encode("Once upon a time.", add_special_tokens=False)
    engine.script = lambda call: [Delta(ids, (), "length", 0)]
    whole = (await client.post("/v1/completions", json=COMPLETION)).json()
    assert whole["choices"][0]["text"] == "Once upon a time."
    assert whole["choices"][0]["finish_reason"] == "length"
    cut = (await client.post("/v1/completions", json={**COMPLETION, "stop": "upon"})).json()
    assert (cut["choices"][0]["text"], cut["choices"][0]["finish_reason"]) == ("Once ", "stop")
    assert cut["usage"]["completion_tokens"] == 2


async def test_text_held_for_a_stop_string_comes_out_at_the_end(
    client: httpx.AsyncClient, engine: FakeEngine, says: Says
) -> None:
    """Guards against the last characters lost where an answer ends in the beginning of a stop string."""
    engine.script = says("the E", finish="length")
    answer = await client.post("/v1/completions", json={**COMPLETION, "stop": "END", "stream": True})
    chunks = events(answer)[:-1]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "the E"
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


async def test_logprobs_of_completions(client: httpx.AsyncClient, engine: FakeEngine, says: Says) -> None:
    """Guards against offsets that do not point at the token's text, and parts of characters that look alike."""
    engine.script = says("a é end", finish="length")
    asked = {**COMPLETION, "logprobs": 1, "stream": True}
    chunks = events(await client.post("/v1/completions", json=asked))[:-1]
    whole = (await client.post("/v1/completions", json={**asked, "stream": False})).json()["choices"][0]
    shown = whole["logprobs"]
    assert [token for token in shown["tokens"] if token.startswith("bytes:")] == ["bytes:\\xc3", "bytes:\\xa9"]
    for token, offset in zip(shown["tokens"], shown["text_offset"], strict=True):
        assert token.startswith("bytes:") or whole["text"].startswith(token, offset)
    assert all(token in top for token, top in zip(shown["tokens"], shown["top_logprobs"], strict=True))
    for key in ("tokens", "token_logprobs", "text_offset"):
        parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
        assert [value for part in parts for value in part[key]] == shown[key]


async def test_logprobs_of_chats(client: httpx.AsyncClient, engine: FakeEngine, says: Says) -> None:
    """Guards against `bytes` that do not rebuild the answer, and alternatives that were not asked for."""
    engine.script = says("a é end", finish="length")
    asked = {**CHAT, "logprobs": True}
    content = (await client.post("/v1/chat/completions", json=asked)).json()["choices"][0]["logprobs"]["content"]
    assert bytes(byte for token in content for byte in token["bytes"]).decode() == "a é end"
    assert all(token["top_logprobs"] == [] and token["logprob"] == -0.5 for token in content)
    asked["top_logprobs"] = 1
    content = (await client.post("/v1/chat/completions", json=asked)).json()["choices"][0]["logprobs"]["content"]
    assert [top["logprob"] for top in content[0]["top_logprobs"]] == [-0.25]


# ---- failures -----------------------------------------------------------------------------------------------------

FAILURES = [
    (BadRequest("no", param="prompt", code="odd"), 400),
    (Overloaded("full", retry_after_s=2.5), 429),
    (PeerLost("no decode worker"), 503),
    (TransferFailed("lost"), 503),
    (DeadlineExceeded("late"), 504),
    (InvariantBroken("secret detail"), 500),
    (ValueError("secret detail"), 500),
]


@pytest.mark.parametrize(("error", "status"), FAILURES, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_before_the_first_token_is_a_status(
    client: httpx.AsyncClient, engine: FakeEngine, error: Exception, status: int, stream: bool
) -> None:
    """Guards against 200 for a stream that never began, and against tracebacks that reach a client."""
    engine.script = lambda call: [error]
    answer = await client.post("/v1/completions", json={**COMPLETION, "stream": stream})
    assert answer.status_code == status
    error_body = answer.json()["error"]
    assert set(error_body) == {"message", "type", "param", "code"}
    assert (str(error) in error_body["message"]) == isinstance(error, BatonError) * (status != 500)
    assert "secret" not in answer.text and "Traceback" not in answer.text
    assert answer.headers.get("retry-after") == {429: "3", 503: "1"}.get(status)


@pytest.mark.parametrize(("error", "status"), FAILURES, ids=lambda value: type(value).__name__)
async def test_a_failure_in_mid_stream_is_the_last_event(
    client: httpx.AsyncClient, engine: FakeEngine, error: Exception, status: int
) -> None:
    """Guards against a broken stream that looks complete, to a client that reads [DONE] or a finish_reason."""
    engine.script = lambda call: [Delta((300,)), error]
    answer = await client.post("/v1/completions", json={**COMPLETION, "stream": True})
    assert answer.status_code == 200
    *chunks, last = events(answer)
    assert set(last) == {"error"}
    assert "secret" not in answer.text
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)


async def test_an_engine_that_ends_without_a_finish_is_a_failure(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """Guards against a truncated answer passed on as a complete one."""
    engine.script = lambda call: [Delta((300,))]
    assert (await client.post("/v1/completions", json=COMPLETION)).status_code == 500


@pytest.mark.parametrize("stream", [False, True])
async def test_the_first_failure_cancels_the_other_choices(
    client: httpx.AsyncClient, engine: FakeEngine, stream: bool
) -> None:
    """Guards against siblings of a failed choice that run on although the request has failed."""
    others = asyncio.Event()

    def script(call: EngineCall) -> list[ScriptStep]:
        if len(engine.calls) == 3:
            others.set()
        return [others, PeerLost("gone")] if call.request_id.endswith("-0") else [asyncio.Event()]

    engine.script = script
    answer = await client.post("/v1/completions", json={**COMPLETION, "n": 3, "stream": stream})
    assert answer.status_code == 503
    assert len(engine.cancelled) == 2
    assert engine.running == set()


async def test_time_up_at_the_engine_and_at_the_app(
    engine: FakeEngine, text: ModelText, app_settings: AppSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a request that waits for ever on an engine that forgot its deadline."""
    monkeypatch.setattr("baton.proxy.http.endpoint.DEADLINE_GRACE_S", 0.0)
    at_the_app: list[asyncio.Timeout] = []

    def timeout(delay_s: float | None, real: Any = asyncio.timeout) -> asyncio.Timeout:
        made: asyncio.Timeout = real(delay_s)
        if delay_s == 600.0:
            at_the_app.append(made)
        return made

    def script(call: EngineCall) -> list[ScriptStep]:
        (deadline,) = at_the_app
        deadline.reschedule(0.0)  # the time is up, but not before the engine was asked
        return [asyncio.Event()]

    monkeypatch.setattr(asyncio, "timeout", timeout)
    engine.script = script
    app = create_app(engine, {"demo": text}, replace(app_settings, request_timeout_s=600.0))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://proxy") as client:
        answer = await client.post("/v1/completions", json=COMPLETION)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    assert len(engine.cancelled) == 1
    assert 0 < engine.calls[0].timeout_s <= 600.0


async def test_no_worker_yet(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """Guards against a prompt refused as too long only because no worker has said how long it may be."""
    engine.model_len, engine.not_ready = 0, "no worker has registered"
    answer = await client.post("/v1/completions", json=COMPLETION)
    assert (answer.status_code, answer.json()["error"]["message"]) == (503, "no worker has registered")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"", 400, "invalid_json"),
        (b"\xff" * 10, 400, "invalid_json"),
        (b'{"model": ' + b"[" * 10_000, 400, "invalid_json"),
        (
            b'{"model": "other", "prompt": "x", "messages": [{"role": "user", "content": "x"}]}',
            404,
            "model_not_found",
        ),
        (b"x" * (11 << 20), 413, "request_too_large"),
    ],
    ids=["empty", "not UTF-8", "deep", "other model", "11 MB"],
)
async def test_bad_bodies(client: httpx.AsyncClient, path: str, content: bytes, status: int, code: str) -> None:
    """Guards against anything but a clear refusal, and against an engine that sees such a request."""
    answer = await client.post(path, content=content)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


async def test_an_unknown_model(client: httpx.AsyncClient) -> None:
    """Guards against answering for a model that is not there."""
    answer = await client.post("/v1/completions", json={**COMPLETION, "model": "gpt-9"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert (await client.get("/v1/models/gpt-9")).status_code == 404


async def test_a_body_without_a_length_is_bounded_too() -> None:
    """Guards against a chunked body that grows without end: its bytes are counted while they arrive."""
    received = 0

    async def receive() -> dict[str, Any]:
        nonlocal received
        received += 1 << 20
        return {"type": "http.request", "body": bytes(1 << 20), "more_body": True}

    with pytest.raises(BadRequest) as raised, BodyMemory(1 << 30, lambda: None).hold() as held:
        await read_body({"type": "http", "headers": []}, receive, 1 << 20, held)
    assert raised.value.status == 413
    assert received < 100 << 20


async def test_too_many_requests_at_once(engine: FakeEngine, text: ModelText, app_settings: AppSettings) -> None:
    """Guards against memory without bound, and a place that is not given back after an answer or a failure."""
    app = create_app(engine, {"demo": text}, replace(app_settings, max_requests=1))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://proxy") as client:
        begun, go_on = asyncio.Event(), asyncio.Event()

        def script(call: EngineCall) -> list[ScriptStep]:
            begun.set()
            return [go_on, Delta((300,), (), "length")]

        engine.script = script
        first = asyncio.create_task(client.post("/v1/completions", json=COMPLETION))
        await begun.wait()
        second = await client.post("/v1/completions", json=COMPLETION)
        assert (second.status_code, second.headers["retry-after"]) == (429, "1")
        go_on.set()
        assert (await first).status_code == 200
        assert (await client.post("/v1/completions", json={**COMPLETION, "n": -1})).status_code == 400
        assert (await client.post("/v1/completions", json=COMPLETION)).status_code == 200


def test_a_gate_counts_down_on_every_path() -> None:
    """Guards against a place lost when what is inside raises."""
    gate = RequestLimit(1)
    with pytest.raises(ValueError), gate:
        raise ValueError
    assert gate.inside == 0


# ---- clients that go away -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tokens_before", [0, 2])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_goes_away_cancels_every_generation(
    engine: FakeEngine, text: ModelText, app_settings: AppSettings, stream: bool, tokens_before: int, n: int
) -> None:
    """Guards against generating for a client that is gone: while it waits, whole answers and streams."""
    everything_runs = asyncio.Event()

    def script(call: EngineCall) -> list[ScriptStep]:
        if len(engine.calls) == n:
            everything_runs.set()
        return [*[Delta((300,))] * tokens_before, asyncio.Event()]

    engine.script = script
    body = json.dumps({**COMPLETION, "stream": stream, "n": n}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await everything_runs.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
    app = create_app(engine, {"demo": text}, app_settings)
    await asyncio.wait_for(app(scope, receive, send), timeout=60)
    assert sorted(engine.cancelled) == sorted(call.request_id for call in engine.calls)
    assert len(engine.calls) == n
    assert engine.running == set()
    assert not any(b"[DONE]" in message.get("body", b"") for message in sent)


async def test_a_connection_closed_under_a_write_cancels_too(
    engine: FakeEngine, text: ModelText, app_settings: AppSettings
) -> None:
    """Guards against a server whose send raises, which must not look like a failure of ours."""
    engine.script = lambda call: [Delta((300,)), asyncio.Event()]
    body = [json.dumps({**COMPLETION, "stream": True}).encode()]

    async def receive() -> dict[str, Any]:
        if body:
            return {"type": "http.request", "body": body.pop(), "more_body": False}
        await asyncio.Event().wait()
        return {}

    async def send(message: Any) -> None:
        raise OSError("connection closed")

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
    await asyncio.wait_for(create_app(engine, {"demo": text}, app_settings)(scope, receive, send), timeout=60)
    assert len(engine.cancelled) == 1


async def test_a_server_that_stops_cancels_what_runs(
    engine: FakeEngine, text: ModelText, app_settings: AppSettings
) -> None:
    """Guards against a generation left behind where the server cancels the task of a request."""
    begun = asyncio.Event()

    def script(call: EngineCall) -> list[ScriptStep]:
        begun.set()
        return [asyncio.Event()]

    engine.script = script
    app = create_app(engine, {"demo": text}, app_settings)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://proxy") as client:
        request = asyncio.create_task(client.post("/v1/completions", json={**COMPLETION, "n": 2}))
        await begun.wait()
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
    assert engine.running == set()


async def test_the_clients_key_reaches_the_router(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """Guards the way of `prompt_cache_key` from the body to the engine."""
    for more in ({"prompt_cache_key": "a"}, {"prompt_cache_key": "a"}, {}):
        answer = await client.post("/v1/completions", json={"model": "demo", "prompt": "Hi", "max_tokens": 3, **more})
        assert answer.is_success
    keys = [call.generation.session_key for call in engine.calls]
    assert keys[0] == keys[1] and len(keys[0]) == 16 and keys[2] == b""


async def test_the_salt_reaches_the_engine_as_a_digest(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """Guards the way of `cache_salt` from the body to the engine, and its bounds."""
    for more in ({"cache_salt": "a"}, {"cache_salt": "b"}, {"cache_salt": None}, {}):
        answer = await client.post("/v1/completions", json={"model": "demo", "prompt": "Hi", "max_tokens": 3, **more})
        assert answer.is_success
    salts = [call.generation.cache_salt for call in engine.calls]
    assert salts == [cache_salt("a"), cache_salt("b"), b"", b""]
    for wrong in ("", "x" * 1025, 5):
        answer = await client.post("/v1/completions", json={"model": "demo", "prompt": "Hi", "cache_salt": wrong})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "cache_salt")


@pytest.fixture
def metaspace(tmp_path: Path) -> ModelText:
    """A tokenizer of SentencePiece's kind: decoding strips the space before a text's first word."""
    pieces = ["<unk>", "\u2581the", "\u2581red", "\u2581fox"]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(rank)) for rank, piece in enumerate(pieces)], unk_id=0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return ModelText(tmp_path)


async def test_an_answer_keeps_the_space_between_it_and_its_prompt(engine: FakeEngine, metaspace: ModelText) -> None:
    """Guards against prompt and answer that run together, and against log probabilities of another text."""
    likely = Logprob(-0.5, ((3, -0.25),))
    engine.script = lambda call: [Delta((2,), (likely,)), Delta((3,), (likely,), "length")]
    app = create_app(engine, {"demo": metaspace}, AppSettings())
    asked = {"model": "demo", "prompt": "the", "max_tokens": 2}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://proxy") as client:
        whole = (await client.post("/v1/completions", json={**asked, "logprobs": 1})).json()["choices"][0]
        echoed = (await client.post("/v1/completions", json={**asked, "echo": True})).json()["choices"][0]
        *streamed, _ = events(await client.post("/v1/completions", json={**asked, "stream": True}))
    assert whole["text"] == "".join(chunk["choices"][0]["text"] for chunk in streamed) == " red fox"
    assert echoed["text"] == "the red fox"
    assert whole["logprobs"]["tokens"] == [" red", " fox"]
    assert whole["logprobs"]["top_logprobs"][0] == {" fox": -0.25, " red": -0.5}
    assert whole["logprobs"]["text_offset"] == [0, 4]
