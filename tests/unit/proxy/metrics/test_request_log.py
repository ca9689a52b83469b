"""The request log and its records: what is logged and kept of a request that is over, and what never is."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator
from dataclasses import replace

import httpx
import msgspec
import pytest

from baton.node.messages.control import SamplingSpec, Stages
from baton.proxy.http.app import create_app
from baton.proxy.interface import AppSettings, Delta, Generation
from baton.proxy.metrics.record import GenerationInfo, GenerationRecord, as_json
from baton.proxy.metrics.request_log import RequestLog
from baton.proxy.metrics.timeline import USUAL, Attempt, Segment, Timeline
from baton.proxy.text.model_text import ModelText
from baton.testing.fake_engine import EngineCall, FakeEngine, ScriptStep

SECRET = "zyzzyva"
COMPLETION = {"model": "demo", "prompt": f"A {SECRET} said"}


def record(request_id: str = "cmpl-1", index: int = 0, took_s: float = 2.0) -> GenerationRecord:
    sampling = SamplingSpec(max_tokens=4)
    info = GenerationInfo(
        request_id, index, "text_completion", "demo", True, 7, sampling, 1_700_000_000_000_000_000, {}
    )
    segments = (Segment("first_token", True, took_s, (("prefill", took_s), ("network", 0.0))),)
    attempts = (Attempt("p0/1", "d0/1", "lost"), Attempt("p1/1", "d0/1"))
    return GenerationRecord(info, "length", 4, 3, segments, attempts, 2, (2, 0, 0), bytes(range(32)))


def test_one_line_a_request_with_everything_in_it(caplog: pytest.LogCaptureFixture) -> None:
    """Guards the log: outcome, lengths, workers, the hash's beginning, and each stage under its segment."""
    caplog.set_level(logging.DEBUG, "proxy")
    RequestLog().add(record())
    (line,) = caplog.messages
    assert line == (
        "request_finished request_id=cmpl-1 index=0 outcome=length prompt_tokens=7 cached_tokens=3 generated_tokens=4 "
        "prefix=0001020304050607 attempts=2 prefill=p1/1 decode=d0/1 total_s=2 first_token_s=2 "
        "first_token.prefill_s=2 first_token.network_s=0"
    )


def test_only_a_slow_request_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """Guards the slow-request log at the default level: it has slow ones and nothing else."""
    caplog.set_level(logging.INFO, "proxy")
    log = RequestLog(slow_s=2.0)
    log.add(record(took_s=2.0))
    assert caplog.messages == []
    log.add(record(took_s=2.5))
    (line,) = caplog.records
    assert line.levelno == logging.WARNING and line.message.startswith("request_slow request_id=cmpl-1 ")


def test_the_ring_is_bounded() -> None:
    """Guards memory: the oldest records go, also where all have one id, which a client may choose."""
    log = RequestLog(keep=3)
    for number in range(10):
        log.add(record(f"r{number}"))
    assert [bool(log.find(f"r{number}")) for number in range(10)] == [False] * 7 + [True] * 3
    for index in range(5):
        log.add(record("many", index))
    assert [each.info.index for each in log.find("many")] == [2, 3, 4]
    assert not log.find("r9")
    off = RequestLog()
    off.add(record())
    assert off.find("cmpl-1") == []


def test_json_has_the_whole_timeline() -> None:
    """Guards /debug/requests: numbers, not texts of numbers, and every attempt with its end."""
    shown = json.loads(msgspec.json.encode(as_json(record())))
    assert shown["timeline"] == [
        {"until": "first_token", "complete": True, "total_s": 2.0, "stages": {"prefill": 2.0, "network": 0.0}}
    ]
    assert [(each["decode"], each["end"]) for each in shown["attempts"]] == [("d0/1", "lost"), ("d0/1", "")]
    assert shown["tokens_by_source"] == {"gpu": 1, "ram": 2, "disk": 0, "peer": 0, "computed": 4}
    assert shown["prefix_hash"] == "0001020304050607" and shown["began_unix_s"] == 1_700_000_000


class StampingEngine(FakeEngine):
    """The fake, which stamps the timeline as the real engine would."""

    async def generate(
        self, generation: Generation, timeline: Timeline, *, timeout_s: float
    ) -> AsyncGenerator[Delta, None]:
        timeline.enter("queue")
        timeline.enter("route")
        timeline.dispatch("p0/1", "d0/1", b"\xab" * 32)
        reports = [Stages(queue_s=1e-9, prefill_s=1e-9), Stages(transfer_s=1e-9, step_s=1e-9)]
        async for delta in super().generate(generation, timeline, timeout_s=timeout_s):
            if reports:
                timeline.report(reports.pop(0))
            yield delta


@pytest.fixture
def engine(says) -> FakeEngine:  # type: ignore[no-untyped-def]
    return StampingEngine(says(f"Once upon a {SECRET}."))


@pytest.fixture
def app_settings() -> AppSettings:
    return AppSettings(debug_requests=100)


async def look_up(client: httpx.AsyncClient, answer: httpx.Response) -> list[dict]:  # type: ignore[type-arg]
    found = await client.get(f"/debug/requests/{answer.headers['x-request-id']}")
    assert found.status_code == 200, found.text
    shown = found.json()
    assert shown["id"] == answer.headers["x-request-id"]
    return list(shown["generations"])


def demand_sums(generation: dict) -> None:  # type: ignore[type-arg]
    for segment in generation["timeline"]:
        assert sum(segment["stages"].values()) == pytest.approx(segment["total_s"], abs=1e-9)
        assert all(took_s >= 0.0 for took_s in segment["stages"].values())


@pytest.mark.parametrize("stream", [True, False])
async def test_a_finished_request_can_be_looked_up(client: httpx.AsyncClient, stream: bool) -> None:
    """Guards the way from the first byte to the record: every segment complete, all stages there, their sum exact."""
    answer = await client.post("/v1/completions", json={**COMPLETION, "stream": stream})
    (generation,) = await look_up(client, answer)
    assert [(segment["until"], segment["complete"]) for segment in generation["timeline"]] == [(u, True) for u in USUAL]
    for segment in generation["timeline"]:
        assert set(segment["stages"]) >= set(USUAL[segment["until"]])
    demand_sums(generation)
    assert generation["outcome"] == "stop" and generation["stream"] == stream
    assert generation["prefix_hash"] == "abababababababab"


async def test_each_of_several_answers_has_its_own(client: httpx.AsyncClient) -> None:
    """Guards n > 1: one record an answer, under the one id that the client has."""
    answer = await client.post(
        "/v1/chat/completions", json={"model": "demo", "n": 3, "messages": [{"role": "user", "content": SECRET}]}
    )
    generations = await look_up(client, answer)
    assert sorted(each["index"] for each in generations) == [0, 1, 2]
    assert {each["operation"] for each in generations} == {"chat"}
    for generation in generations:
        demand_sums(generation)


async def test_a_failed_and_a_refused_request_have_timelines_too(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """Guards the requests that one asks about most: where they ended, and as what."""

    def broken(call: EngineCall) -> list[ScriptStep]:
        return [ValueError("a bug")]

    engine.script = broken
    failed = await client.post("/v1/completions", json=COMPLETION)
    (generation,) = await look_up(client, failed)
    assert (failed.status_code, generation["outcome"]) == (500, "internal")
    (segment,) = generation["timeline"]
    assert not segment["complete"] and segment["stages"]["in_flight"] > 0.0
    demand_sums(generation)
    refused = await client.post("/v1/completions", json={**COMPLETION, "max_tokens": -1})
    (generation,) = await look_up(client, refused)
    assert (refused.status_code, generation["outcome"]) == (400, "bad_request")
    assert generation["attempts"] == []
    demand_sums(generation)


async def test_no_text_is_logged_or_shown(client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    """Guards the users' prompts and answers: neither the log at its most talkative nor the route has a word of them."""
    caplog.set_level(logging.DEBUG, "proxy")
    answer = await client.post("/v1/completions", json=COMPLETION)
    assert SECRET in answer.text
    shown = json.dumps(await look_up(client, answer))
    assert "request_finished" in caplog.text
    assert SECRET not in shown and SECRET not in caplog.text


async def test_without_the_option_there_is_no_such_route(
    engine: FakeEngine, text: ModelText, app_settings: AppSettings
) -> None:
    """Guards the default: requests cannot be looked up unless that is switched on."""
    app = create_app(engine, {"demo": text}, replace(app_settings, debug_requests=0))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://proxy") as client:
        answer = await client.post("/v1/completions", json=COMPLETION)
        found = await client.get(f"/debug/requests/{answer.headers['x-request-id']}")
        assert found.status_code == 404
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(create_app(engine, {"demo": text}, app_settings)), base_url="http://proxy"
    ) as client:
        assert (await client.get("/debug/requests/cmpl-unknown")).json()["error"]["code"] == "request_not_found"


async def test_a_request_is_found_by_its_clients_id_and_by_its_answers(client: httpx.AsyncClient) -> None:
    """Guards against a request that only its client's logs know by its id."""
    answer = await client.post("/v1/completions", json=COMPLETION, headers={"x-request-id": "team/7"})
    assert answer.status_code == 200, answer.text
    for request_id in ("team/7", answer.json()["id"]):
        found = await client.get(f"/debug/requests/{request_id}")
        assert found.status_code == 200, (request_id, found.text)
        assert len(found.json()["generations"]) == 1
