"""The routes beside generation: models, probes, tokenizer, keys; and what the proxy must not need."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import httpx
import pytest

from baton.node.errors import PeerLost
from baton.node.messages.control import Load
from baton.proxy.http.app import create_app
from baton.proxy.interface import AppSettings, Delta, WorkerStatus
from baton.proxy.text.model_text import ModelText
from baton.testing.fake_engine import EngineCall, FakeEngine, ScriptStep

Says = Callable[..., Callable[[EngineCall], list[ScriptStep]]]
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION = {"model": "demo", "prompt": "Hi"}


async def test_models(client: httpx.AsyncClient) -> None:
    """Guards against a list that clients cannot read."""
    listed = (await client.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert listed["data"] == [(await client.get("/v1/models/demo")).json()]
    assert (listed["data"][0]["id"], listed["data"][0]["max_model_len"]) == ("demo", 2048)


async def test_a_second_model_is_one_more_entry(engine: FakeEngine, text: ModelText) -> None:
    """Guards names: each request reaches the engine under its model's, and is counted under it."""
    app = create_app(engine, {"demo": text, "other": text}, AppSettings())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://proxy") as client:
        listed = (await client.get("/v1/models")).json()["data"]
        assert [model["id"] for model in listed] == ["demo", "other"]
        answer = await client.post("/v1/completions", json={"model": "other", "prompt": "Hi"})
        assert answer.json()["model"] == "other" and engine.calls[0].generation.model == "other"
        metrics = (await client.get("/metrics")).text
        refused = await client.post("/v1/completions", json={"model": "third", "prompt": "Hi"})
    assert 'vllm:request_success_total{finished_reason="stop",model_name="other"} 1.0' in metrics
    assert 'vllm:request_success_total{finished_reason="stop",model_name="demo"} 0.0' in metrics
    assert metrics.count("# TYPE vllm:generation_tokens_total counter") == 1
    assert refused.status_code == 404


async def test_further_names_of_a_model(engine: FakeEngine, text: ModelText) -> None:
    """Guards against a name that is listed but refused, an answer under another name than was asked for, and an engine
    that is asked for a model that no worker has."""
    app = create_app(engine, {"demo": text}, AppSettings(aliases=("gpt-4o", "org/x")))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://proxy") as client:
        listed = (await client.get("/v1/models")).json()["data"]
        assert [model["id"] for model in listed] == ["demo", "gpt-4o", "org/x"]
        assert (await client.get("/v1/models/org/x")).json() == listed[2]
        for path, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
            answer = await client.post(path, json={**body, "model": "gpt-4o"})
            assert (answer.status_code, answer.json()["model"]) == (200, "gpt-4o")
        assert (await client.post("/tokenize", json={"model": "gpt-4o", "prompt": "Hi"})).status_code == 200
        metrics = (await client.get("/metrics")).text
    assert {call.generation.model for call in engine.calls} == {"demo"}
    assert 'vllm:request_success_total{finished_reason="stop",model_name="demo"} 2.0' in metrics
    assert "gpt-4o" not in metrics


async def test_probes(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """Guards against an orchestrator that sends traffic to a proxy without workers, or kills one that only waits."""
    for path in ("/health", "/ready", "/live", "/health_generate"):
        assert (await client.get(path)).status_code == 200
    assert engine.calls[-1].sampling.max_tokens == 2  # the second one is decode's
    assert len(engine.calls[-1].prompt_ids) >= 16  # so that KV has to move
    engine.not_ready = "no decode worker"
    engine.script = lambda call: [PeerLost("no decode worker")]
    for path in ("/health", "/ready", "/health_generate"):
        answer = await client.get(path)
        assert (answer.status_code, answer.json()["reason"]) == (503, "no decode worker")
    assert (await client.get("/live")).status_code == 200


async def test_health_generate_is_bounded(engine: FakeEngine, text: ModelText, app_settings: AppSettings) -> None:
    """Guards against a probe that hangs with the worker that it should find out about."""
    engine.script = lambda call: [asyncio.Event()]
    app = create_app(engine, {"demo": text}, replace(app_settings, probe_timeout_s=0.02))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://proxy") as client:
        answers = await asyncio.gather(*(client.get("/health_generate") for _ in range(3)))
    assert [answer.status_code for answer in answers] == [503] * 3
    assert engine.running == set()


async def test_probes_generate_one_at_a_time(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """Guards against a burst of probes that becomes a load of its own."""
    begun, go_on = asyncio.Event(), asyncio.Event()

    def script(call: EngineCall) -> list[ScriptStep]:
        begun.set()
        return [go_on, Delta((300,), (), "length")]

    engine.script = script
    probes = [asyncio.create_task(client.get("/health_generate")) for _ in range(2)]
    await begun.wait()
    for _ in range(100):  # the other one gets every chance
        await asyncio.sleep(0)
    assert len(engine.calls) == 1
    go_on.set()
    assert [answer.status_code for answer in await asyncio.gather(*probes)] == [200, 200]
    assert len(engine.calls) == 2


async def test_tokenize_and_back(client: httpx.AsyncClient) -> None:
    """Guards against tokens that differ from what a completion would use."""
    tokens = (await client.post("/tokenize", json={"prompt": "Hi é"})).json()
    assert tokens["count"] == len(tokens["tokens"])
    assert (await client.post("/detokenize", json={"tokens": tokens["tokens"]})).json() == {"prompt": "Hi é"}
    for path, body in (("/tokenize", {}), ("/detokenize", {"tokens": [2**40]}), ("/detokenize", {"tokens": [4096]})):
        assert (await client.post(path, json=body)).status_code == 400


async def test_unknown_routes_and_methods(client: httpx.AsyncClient) -> None:
    """Guards against an error page in another shape than OpenAI's."""
    for method, path, status in (("GET", "/nope", 404), ("GET", "/v1/completions", 405), ("POST", "/health", 405)):
        answer = await client.request(method, path)
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.fixture
def guarded(engine: FakeEngine, text: ModelText, app_settings: AppSettings) -> httpx.AsyncClient:
    settings = replace(app_settings, api_keys=("first-key", "schlüssel"), debug_requests=4)
    app = create_app(engine, {"demo": text}, settings)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://proxy")


async def test_keys_guard_every_route_but_the_probes(guarded: httpx.AsyncClient, engine: FakeEngine) -> None:
    """Guards against a route that was forgotten: the list is the app's own."""
    app = guarded._transport.app  # type: ignore[attr-defined]
    paths = {route.path.replace("{name:path}", "demo") for route in app.routes}
    assert {"/v1/completions", "/v1/chat/completions", "/metrics", "/version", "/tokenize"} <= paths
    assert "/debug/requests/{request_id:path}" in paths
    for path in {*paths, "/unknown", "/docs", "/openapi.json"}:
        for method in ("GET", "POST"):
            status = (await guarded.request(method, path, json=COMPLETION)).status_code
            is_open = path in ("/health", "/live", "/ready") or path.startswith("/dashboard")
            assert (status == 401) == (not is_open), path
    assert engine.calls == []


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Bearer first-key", 200),
        ("bearer first-key", 200),
        ("Bearer first-key ", 200),
        ("Bearer first-kez", 401),
        ("Bearer first-key2", 401),
        ("Bearer", 401),
        ("Bearer ", 401),
        ("Basic first-key", 401),
        ("first-key", 401),
        ("", 401),
    ],
)
async def test_keys(guarded: httpx.AsyncClient, header: str, status: int) -> None:
    """Guards against a prefix, another scheme or no key at all getting in."""
    answer = await guarded.get("/v1/models", headers={"authorization": header})
    assert answer.status_code == status
    if status == 401:
        assert answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"x-api-key": "first-key"}, 200),
        ({"x-api-key": "first-kez"}, 401),
        ({"x-api-key": ""}, 401),
        ({"x-api-key": "Bearer first-key"}, 401),
        ({"x-api-key": "first-key", "authorization": "Bearer first-kez"}, 401),
        ({"x-api-key": "first-kez", "authorization": "Bearer first-key"}, 200),
        ({"x-api-key": "first-key", "authorization": "Basic x"}, 200),
    ],
)
async def test_keys_as_clients_of_anthropic_send_them(
    guarded: httpx.AsyncClient, headers: dict[str, str], status: int
) -> None:
    """Guards against a second header that lets in what the first one does not, or that stays unread."""
    assert (await guarded.get("/v1/models", headers=headers)).status_code == status


async def test_a_key_beyond_ascii(guarded: httpx.AsyncClient) -> None:
    """Guards against a crash in comparing, and a configured key that can never match."""
    answer = await guarded.get("/v1/models", headers={b"authorization": "Bearer schlüssel".encode()})
    assert answer.status_code == 200


async def test_metrics_may_be_off(engine: FakeEngine, text: ModelText, app_settings: AppSettings) -> None:
    """Guards against a setting that does nothing."""
    app = create_app(engine, {"demo": text}, replace(app_settings, metrics=False))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://proxy") as client:
        assert (await client.get("/metrics")).status_code == 404


async def test_a_bug_in_a_route_stays_inside(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """Guards against a traceback in the answer of a route that has no handler of its own."""
    engine.workers = [WorkerStatus("w", "decode", "up", Load())]
    engine.totals = {"secret": "no number"}  # type: ignore[dict-item]
    answer = await client.get("/metrics")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in answer.text


def test_the_proxy_needs_neither_torch_nor_transformers_and_little_memory() -> None:
    """Guards against an import that costs a gigabyte and ten seconds in a process that never touches a tensor."""
    # The peak of getrusage would be that of this process too: it survives fork and exec.
    program = (
        "import sys, baton.proxy.http.app, uvicorn\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), sorted(sys.modules)\n"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 150 * 1024, "KiB at its peak; 250 MB are allowed with a model's tokenizer loaded"
