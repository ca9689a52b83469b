"""Guards what each tenant sees of a proxy: its models, its cache, its priority; other routes are closed to it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping

import httpx
import pytest

from baton.kvtransfer.blocks.hashing import cache_salt
from baton.node.tenant_rules import TenantRules
from baton.proxy.http.app import app_of
from baton.proxy.http.guard import FOR_ALL, FOR_MONITORS, ONE_MODEL
from baton.proxy.http.service import make_service
from baton.proxy.interface import AppSettings
from baton.proxy.tenants.tenants import Tenants
from baton.proxy.text.model_text import ModelText
from baton.testing.fake_engine import FakeEngine

COMPLETION = {"model": "demo", "prompt": "Hi", "max_tokens": 4}


def rules(key: str, **more: object) -> TenantRules:
    return TenantRules(keys_sha256=(hashlib.sha256(key.encode()).hexdigest(),), **more)


RULES = {
    "a": rules("a"),
    "b": rules("b", priority_floor=7),
    "few": rules("few", models=("gpt-4o",)),
    "none": rules("none", models=("elsewhere",)),
    "shared": rules("shared", cache="shared"),
    "monitor": rules("monitor", metrics=True),
    "root": rules("root", admin=True),
}


def key(tenant: str) -> Mapping[str, str]:
    return {"authorization": f"Bearer {tenant}"}


@pytest.fixture
async def client(engine: FakeEngine, text: ModelText) -> AsyncIterator[httpx.AsyncClient]:
    settings = AppSettings(aliases=("gpt-4o",), debug_requests=4)
    app = app_of(make_service(engine, {"demo": text}, settings, tenants=Tenants(RULES)))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://proxy") as made:
        yield made


async def test_every_route_is_closed_that_is_not_opened(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """Guards against a new route that tells a tenant of others: the list is the app's own."""
    app = client._transport.app  # type: ignore[attr-defined]
    paths = {route.path for route in app.routes}
    assert {"/metrics", "/debug/requests/{request_id:path}", "/health_generate"} <= paths
    for path in paths:
        probe = path in ("/health", "/live", "/ready") or path.startswith("/dashboard")
        for tenant in ("a", "monitor"):
            for method in ("GET", "POST", "HEAD", "DELETE"):
                answer = await client.request(method, path.replace("{request_id:path}", "x"), headers=key(tenant))
                allowed = (
                    path in FOR_ALL or path.startswith(ONE_MODEL) or (tenant == "monitor" and path in FOR_MONITORS)
                )
                assert (answer.status_code == 403) == (not probe and not allowed), (path, tenant, method)
    assert all(call.request_id.startswith("health-") for call in engine.calls)


async def test_administrators_and_monitors(client: httpx.AsyncClient) -> None:
    """Guards the rights that a file gives, and the form of the error of those without."""
    for path, who in (("/metrics", ("monitor", "root")), ("/debug/requests/x", ("root",))):
        for tenant in RULES:
            answer = await client.get(path, headers=key(tenant))
            assert (answer.status_code != 403) == (tenant in who), (path, tenant)
    error = (await client.get("/metrics", headers=key("a"))).json()["error"]
    assert error["code"] == "insufficient_permissions"
    assert (await client.get("/metrics/", headers=key("a"), follow_redirects=True)).status_code == 403
    assert (await client.get("http://proxy//metrics", headers=key("a"))).status_code == 403
    assert (await client.get("/v1/embeddings", headers=key("a"))).status_code == 404, "the 404 says what there is"


async def test_a_key_of_no_tenant(client: httpx.AsyncClient) -> None:
    """Guards against the SHA-256 in the file being a key itself."""
    for offered in ("", "c", RULES["a"].keys_sha256[0]):
        assert (await client.get("/v1/models", headers=key(offered))).status_code == 401
    assert (await client.get("/v1/models", headers={"authorization": "Basic a"})).status_code == 401


async def test_a_tenant_sees_its_models_only(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """Guards against a model that a tenant may not use, or learns of from an error."""

    async def listed(tenant: str) -> list[str]:
        answer = await client.get("/v1/models", headers=key(tenant))
        return [model["id"] for model in answer.json()["data"]]

    assert [await listed(tenant) for tenant in ("a", "few", "none")] == [["demo", "gpt-4o"], ["gpt-4o"], []]
    assert (await client.get("/v1/models/demo", headers=key("few"))).status_code == 404
    for tenant, model, status in (("few", "gpt-4o", 200), ("few", "demo", 404), ("none", "elsewhere", 404)):
        answer = await client.post("/v1/completions", json=COMPLETION | {"model": model}, headers=key(tenant))
        assert answer.status_code == status, (tenant, model)
        if status == 404:
            error = answer.json()["error"]
            assert (error["code"], error["param"]) == ("model_not_found", "model")
            assert "demo" not in error["message"].replace("`demo` does not exist", "")
    assert len(engine.calls) == 1
    chat = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}
    assert (await client.post("/v1/chat/completions/render", json=chat, headers=key("few"))).status_code == 404
    for tenant, status in (("few", 200), ("none", 404)):
        assert (await client.post("/tokenize", json={"prompt": "Hi"}, headers=key(tenant))).status_code == status
        assert (await client.post("/detokenize", json={"tokens": [5]}, headers=key(tenant))).status_code == status
        assert (await client.get("/tokenizer_info", headers=key(tenant))).status_code == status


async def test_prefixes_are_the_tenants_own(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """Guards against one tenant finding, by `cached_tokens` or by time, what another has asked."""
    salts = {}
    for tenant in ("a", "b", "shared", "root"):
        for salt in ("", "x", "a", "b"):
            body = COMPLETION | ({"cache_salt": salt} if salt else {})
            assert (await client.post("/v1/completions", json=body, headers=key(tenant))).status_code == 200
            salts[tenant, salt] = engine.calls[-1].generation.cache_salt
    assert len(set(salts.values())) == len(salts)
    assert salts["shared", ""] == b"" and salts["shared", "x"] == cache_salt("x"), "with those that have no tenant"


async def test_a_priority_has_a_floor(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """Guards against a tenant that goes before all others by asking for it; lower numbers are served first."""
    for tenant, priority, served in (("a", -100, 0), ("a", 3, -3), ("b", None, -7), ("b", 9, -9)):
        body = COMPLETION | {"priority": priority}
        assert (await client.post("/v1/completions", json=body, headers=key(tenant))).status_code == 200
        assert engine.calls[-1].generation.priority == served
        assert engine.calls[-1].generation.tenant == tenant


async def test_an_id_in_use_tells_nothing_of_other_tenants(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """Guards against a 409 that says that another tenant has a request of this id."""
    go_on, original = asyncio.Event(), engine.script
    engine.script = lambda call: [go_on, *original(call)] if len(engine.calls) == 1 else original(call)

    async def status(tenant: str) -> int:
        headers = {**key(tenant), "x-request-id": "same"}
        return (await client.post("/v1/completions", json=COMPLETION, headers=headers)).status_code

    first = asyncio.create_task(status("a"))
    while not engine.running:
        await asyncio.sleep(0)
    assert [await status("b"), await status("a")] == [200, 409]
    go_on.set()
    assert await first == 200


async def test_the_responses_api_has_the_rules_of_chats(client: httpx.AsyncClient) -> None:
    """Guards against an API that is closed to tenants, or beside their models and counts."""
    body = {"model": "demo", "input": "Hi", "max_output_tokens": 4}
    assert (await client.post("/v1/responses", json=body, headers=key("a"))).status_code == 200
    assert (await client.post("/v1/responses", json=body)).status_code == 401
    assert (await client.post("/v1/responses", json=body, headers=key("few"))).status_code == 404
    page = (await client.get("/metrics", headers=key("monitor"))).text
    assert 'baton:tenant_requests_total{tenant="a"} 1.0' in page
    assert 'gen_ai_server_request_duration_seconds_count{gen_ai_operation_name="chat"' in page
