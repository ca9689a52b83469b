"""Guards servers without keys on the loopback against web pages that let their own name point there."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from baton.node.errors import SettingsError
from baton.proxy.__main__ import _allowed_hosts
from baton.proxy.http.app import create_app
from baton.proxy.interface import AppSettings
from baton.proxy.settings import ProxySettings
from baton.proxy.text.model_text import ModelText
from baton.testing.fake_engine import FakeEngine

FOREIGN = (
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "evil.example:80@localhost",
    "localhost:80:80",
    "[::1",
    "[evil]",
    "",
    "..",
    "evil.example.",
    "[abc]",
    "a%2eb",
    "a,b",
    "x.llm.internal",
)
OWN = (
    "localhost",
    "LOCALHOST:8000",
    "localhost.",
    "a.localhost:1",
    "127.0.0.1:8000",
    "[::1]",
    "[::1]:8000",
    "192.0.2.7",
    "gpu7:8000",
    "LLM.internal:8000",
    "llm.internal.",
)
PATHS = ("/v1/models", "/metrics", "/health", "/", "/v1/nothing")


@pytest.fixture
async def client(engine: FakeEngine, text: ModelText, app_settings: AppSettings) -> AsyncIterator[httpx.AsyncClient]:
    """Of a server that also answers to `llm.internal`."""
    settings = replace(app_settings, allowed_hosts=("127.0.0.1", "llm.internal"))
    transport = httpx.ASGITransport(create_app(engine, {"demo": text}, settings))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        yield client


@pytest.mark.parametrize("host", FOREIGN)
async def test_a_name_that_is_not_the_servers_is_refused(client: httpx.AsyncClient, host: str) -> None:
    """CVE-2024-28224: a script of evil.example, which resolves to 127.0.0.1, read what a server without keys has."""
    for path in PATHS:
        answer = await client.get(path, headers={"host": host})
        assert answer.status_code == 403, path
        assert "--allowed-host" in answer.json()["error"]["message"]
        assert answer.json()["error"]["code"] == "host_not_allowed"
    preflight = {"host": host, "origin": f"http://{host}", "access-control-request-method": "POST"}
    assert (await client.options("/v1/completions", headers=preflight)).status_code == 403


@pytest.mark.parametrize("host", OWN)
async def test_names_of_the_server_pass(client: httpx.AsyncClient, host: str) -> None:
    """Guards clients on this machine, tunnels to it, and names that the operator has given."""
    assert (await client.get("/v1/models", headers={"host": host})).status_code == 200


async def test_other_servers_look_at_no_host(engine: FakeEngine, text: ModelText, app_settings: AppSettings) -> None:
    """Guards servers behind names that they do not know."""
    transport = httpx.ASGITransport(create_app(engine, {"demo": text}, app_settings))
    async with httpx.AsyncClient(transport=transport, base_url="http://any.example") as client:
        assert (await client.get("/v1/models")).status_code == 200


def test_only_a_server_without_keys_on_the_loopback_is_checked(tmp_path: Path) -> None:
    """Guards the rule: a key stops the page's script, and a network has names that the server cannot know."""
    keys = tmp_path / "keys"
    keys.write_text("k\n")
    assert _allowed_hosts(ProxySettings()) == ("127.0.0.1",)
    assert _allowed_hosts(ProxySettings(host="::1", insecure_network=True)) == ("::1",)
    assert _allowed_hosts(ProxySettings(host="localhost", allowed_host=("a", "b"))) == ("localhost", "a", "b")
    for settings in (
        ProxySettings(api_key=("k",)),
        ProxySettings(api_key_file=keys),
        ProxySettings(tenants=Path("tenants.toml")),
        ProxySettings(allowed_host=("a", "*")),
        ProxySettings(host="0.0.0.0", insecure_network=True),
        ProxySettings(host="node1", insecure_network=True),
    ):
        assert _allowed_hosts(settings) is None


@pytest.mark.parametrize("name", ["http://a", "a:80", "", "a b", "*.a", "a/b"])
def test_a_misspelt_name_is_an_error(name: str) -> None:
    """Guards against an option that allows nothing."""
    with pytest.raises(SettingsError, match="--allowed-host"):
        ProxySettings(allowed_host=(name,))
