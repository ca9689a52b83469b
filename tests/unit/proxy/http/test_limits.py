"""Guards the limits of tenants as their clients see them: 429 with its headers, refunds, shares of the server."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

import httpx
import pytest

from baton.node.errors import Overloaded, PeerLost
from baton.node.tenant_rules import TenantRules
from baton.proxy.http.app import app_of
from baton.proxy.http.prepare import EXPECTED_TOKENS
from baton.proxy.http.service import make_service
from baton.proxy.interface import AppSettings, Delta, Generation
from baton.proxy.metrics.timeline import Timeline
from baton.proxy.tenants.tenants import Tenants
from baton.proxy.text.model_text import ModelText
from baton.testing.fake_engine import FakeEngine

PROMPT = [300, 301, 302, 303]
NOW = 1000.0


def rules(key: str, **more: Any) -> TenantRules:
    return TenantRules(keys_sha256=(hashlib.sha256(key.encode()).hexdigest(),), **more)


RULES = {
    "free": rules("free"),
    "requests": rules("requests", requests_per_minute=2),
    "tokens": rules("tokens", tokens_per_minute=120),
    "places": rules("places", max_concurrent=1),
    "root": rules("root", admin=True),
}


def key(tenant: str) -> Mapping[str, str]:
    return {"authorization": f"Bearer {tenant}"}


@pytest.fixture
async def client(engine: FakeEngine, text: ModelText) -> AsyncIterator[httpx.AsyncClient]:
    engine.script = lambda _: [Delta((300,)), Delta((301,), finish="length")]
    tenants = Tenants(RULES, clock=lambda: NOW)
    app = app_of(make_service(engine, {"demo": text}, AppSettings(max_requests=3), tenants=tenants))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://proxy") as made:
        yield made


async def post(client: httpx.AsyncClient, tenant: str, **more: Any) -> httpx.Response:
    body = {"model": "demo", "prompt": PROMPT, "max_tokens": 6, **more}
    return await client.post("/v1/completions", json=body, headers=key(tenant))


async def test_requests_a_minute(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """Guards the answer of a refused request: clients wait as its headers say."""
    for remaining in ("1", "0"):
        answer = await post(client, "requests")
        assert answer.status_code == 200 and answer.headers["x-ratelimit-remaining-requests"] == remaining
    answer = await post(client, "requests")
    assert answer.status_code == 429
    assert answer.json()["error"] == {
        "message": "Rate limit reached: Limit 2 requests a minute. Please try again in 30s.",
        "type": "rate_limit_error",
        "param": None,
        "code": "rate_limit_exceeded",
    }
    wanted = {"limit": "2", "remaining": "0", "reset": "1m0s"}
    assert {name: answer.headers[f"x-ratelimit-{name}-requests"] for name in wanted} == wanted
    assert answer.headers["retry-after"] == "30" and "x-ratelimit-limit-tokens" not in answer.headers
    assert len(engine.calls) == 2
    assert (await post(client, "free")).status_code == 200


async def test_tokens_are_those_of_the_usage(client: httpx.AsyncClient) -> None:
    """Guards the refund: an answer that ends early leaves the rest of its max_tokens for others."""
    left = 120
    for stream in (False, True):
        answer = await post(client, "tokens", max_tokens=80, stream=stream)
        assert answer.headers["x-ratelimit-remaining-tokens"] == str(left - 84), "reserved while it is answered"
        left -= 6
    answer = await post(client, "tokens", n=3, max_tokens=20)
    assert answer.json()["usage"]["total_tokens"] == 10
    assert answer.headers["x-ratelimit-remaining-tokens"] == str(left - 64), "a prompt counts once"
    left -= 10
    answer = await post(client, "tokens", max_tokens=95)
    assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
    assert answer.headers["x-ratelimit-remaining-tokens"] == str(left)
    answer = await post(client, "tokens", max_tokens=117)
    assert answer.status_code == 429 and "Limit 120 tokens a minute, Requested 121" in answer.json()["error"]["message"]
    assert "retry-after" not in answer.headers


@pytest.mark.parametrize("error", [PeerLost("no worker"), Overloaded("full"), RuntimeError("a bug")])
async def test_what_the_server_does_not_do_costs_nothing(
    client: httpx.AsyncClient, engine: FakeEngine, error: Exception
) -> None:
    """Guards against a server's failure that uses up a tenant's tokens."""
    engine.script = lambda _: [error]
    assert (await post(client, "tokens")).status_code >= 429
    assert (await post(client, "tokens")).headers["x-ratelimit-remaining-tokens"] == "120"


async def test_a_chat_without_max_tokens_reserves_an_expected_length(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    """Guards against a chat that reserves the whole context, which may be more than a minute has."""
    chat = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}
    for more, expected in (({}, EXPECTED_TOKENS), ({"max_tokens": 1500}, 1500)):
        assert (await client.post("/v1/chat/completions", json=chat | more, headers=key("free"))).status_code == 200
        assert engine.calls[-1].generation.expected_tokens == expected


async def test_a_tenant_has_its_places_and_leaves_some(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """Guards other tenants against one that fills the server with requests."""
    go_on = asyncio.Event()
    engine.script = lambda _: [go_on, Delta((300,), finish="length")]

    async def begun(tenant: str) -> asyncio.Task[httpx.Response]:
        count = len(engine.running)
        task = asyncio.create_task(post(client, tenant))
        while len(engine.running) == count:
            await asyncio.sleep(0)
        return task

    tasks = [await begun("places")]
    refused = await post(client, "places")
    assert refused.status_code == 429 and "1 requests of this key" in refused.json()["error"]["message"]
    tokenize = await client.post("/tokenize", json={"prompt": "Hi"}, headers=key("places"))
    assert tokenize.status_code == 429
    tasks.append(await begun("free"))
    refused = await post(client, "free")
    assert refused.status_code == 429 and "the server is nearly full" in refused.json()["error"]["message"]
    tasks.append(await begun("root"))
    assert "3 requests are being answered" in (await post(client, "tokens")).json()["error"]["message"]
    go_on.set()
    assert [(await task).status_code for task in tasks] == [200] * 3
    page = (await client.get("/metrics", headers=key("root"))).text
    for sample in (
        'baton:tenant_rejected_total{reason="concurrent",tenant="places"} 2.0',
        'baton:tenant_rejected_total{reason="share",tenant="free"} 1.0',
        'baton:tenant_requests_total{tenant="free"} 1.0',
        'baton:tenant_tokens_total{kind="prompt",tenant="free"} 4.0',
        'baton:tenant_tokens_total{kind="answer",tenant="free"} 1.0',
    ):
        assert sample in page


class DispatchingEngine(FakeEngine):
    """A worker has each request at once."""

    def generate(self, generation: Generation, timeline: Timeline, *, timeout_s: float) -> AsyncGenerator[Delta, None]:
        timeline.dispatch("", "decode/1", b"")
        return FakeEngine.generate(self, generation, timeline, timeout_s=timeout_s)


@pytest.mark.parametrize(("kind", "paid"), [(FakeEngine, 0), (DispatchingEngine, 4)])
async def test_clients_that_leave_pay_for_what_was_computed(text: ModelText, kind: type[FakeEngine], paid: int) -> None:
    """Guards against prompts that are computed for nothing: their client leaves before the first token."""
    engine = kind(lambda _: [asyncio.Event()])
    tenants = Tenants({"a": rules("a", tokens_per_minute=100)}, clock=lambda: NOW)
    app = app_of(make_service(engine, {"demo": text}, AppSettings(), tenants=tenants))
    content = b'{"model": "demo", "prompt": [300, 301, 302, 303], "max_tokens": 6}'
    messages = iter([{"type": "http.request", "body": content}])

    async def receive() -> Mapping[str, Any]:
        if (message := next(messages, None)) is not None:
            return message
        while not engine.running:
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    async def send(_: object) -> None:
        pass

    headers = [(b"authorization", b"Bearer a")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b""}
    await asyncio.wait_for(app(scope, receive, send), timeout=60)
    (usage,) = [tenant.usage for tenant in tenants]
    assert usage.totals.prompt_tokens == paid and usage.inside == 0
    assert usage.headers()["x-ratelimit-remaining-tokens"] == str(100 - paid)
