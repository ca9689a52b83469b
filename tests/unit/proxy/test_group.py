"""proxy.group: two proxies at one port, in process, each with an app for the other at its Unix socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from baton.models.config import ModelConfig
from baton.node.api_settings import ApiSettings
from baton.node.errors import SettingsError
from baton.node.local_http import proxy_socket
from baton.node.messages.control import Load
from baton.proxy.group import SharedPort
from baton.proxy.http.app import app_of, group_app_of
from baton.proxy.http.service import Service, make_service
from baton.proxy.interface import AppSettings, WorkerStatus
from baton.proxy.settings import ProxySettings
from baton.proxy.text.model_text import ModelText
from baton.testing.adapter_folders import write_adapter
from baton.testing.fake_engine import FakeEngine
from baton.tests.unit.proxy.conftest import DEMO, Says

KEY = {"authorization": "Bearer secret"}


class Pair:
    """Two proxies, of which any may be asked; `client(i)` is one that was connected to proxy i."""

    def __init__(self, folder: Path, says: Says, text: ModelText) -> None:
        self.engines = [FakeEngine(says("Once upon a time."), totals={"requests_total": 0.0}) for _ in range(2)]
        settings = AppSettings(api_keys=("secret",), debug_requests=10, adapter_root=folder)
        self.services: list[Service] = [
            make_service(engine, {"demo": text}, settings, group=SharedPort(folder, index, 2))
            for index, engine in enumerate(self.engines)
        ]

    def client(self, index: int) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(app_of(self.services[index]))
        return httpx.AsyncClient(transport=transport, base_url="http://proxy", headers=KEY)

    async def complete(self, index: int) -> str:
        async with self.client(index) as client:
            answer = await client.post("/v1/completions", json={"model": "demo", "prompt": "Hello", "max_tokens": 9})
            assert answer.status_code == 200
            return str(answer.json()["id"])

    async def samples(self, index: int) -> dict[tuple[str, str], float]:
        """What a scrape that reaches this proxy shows, by name and proxy ("" where a series has no such label)."""
        async with self.client(index) as client:
            page = (await client.get("/metrics")).text
        families = list(text_string_to_metric_families(page))
        assert len({family.name for family in families}) == len(families), "a family is described twice"
        samples = [sample for family in families for sample in family.samples]
        return {(each.name, each.labels.get("proxy", "")): each.value for each in samples if each.value}


@pytest.fixture
def folder() -> Iterator[Path]:
    with TemporaryDirectory() as path:  # pytest's own are too long for a socket
        yield Path(path)


@pytest.fixture
def pair(folder: Path, says: Says, text: ModelText) -> Pair:
    return Pair(folder, says, text)


@asynccontextmanager
async def answering(pair: Pair, folder: Path, index: int) -> AsyncIterator[None]:
    config = uvicorn.Config(group_app_of(pair.services[index]), uds=str(proxy_socket(folder, index)), lifespan="off")
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0)
    yield
    server.should_exit = True
    await task


@pytest.fixture
async def both(pair: Pair, folder: Path) -> AsyncIterator[Pair]:
    async with AsyncExitStack() as stack:
        for index in range(2):
            await stack.enter_async_context(answering(pair, folder, index))
        yield pair


async def test_a_scrape_shows_what_each_proxy_has_counted(both: Pair) -> None:
    """Guards Prometheus against counters that jump, since each scrape reaches another proxy."""
    await both.complete(0)
    for _ in range(2):
        await both.complete(1)
    seen = [await both.samples(index) for index in range(2)]
    for samples in seen:
        assert samples["vllm:e2e_request_latency_seconds_count", "0"] == 1
        assert samples["vllm:e2e_request_latency_seconds_count", "1"] == 2
        assert samples["baton:proxy_up", "0"] == samples["baton:proxy_up", "1"] == 1
    assert {name for name in seen[0] if "created" not in name[0]} == {
        name for name in seen[1] if "created" not in name[0]
    }


async def test_what_workers_report_is_there_once_and_of_the_first_proxy(both: Pair) -> None:
    """Guards sums over workers against being doubled, and counters against falling from one scrape to the next."""
    for tokens, engine in zip((100.0, 90.0), both.engines, strict=True):  # the second has started later
        load = Load(total_blocks=7, counters={"preemptions": tokens})
        engine.workers = [WorkerStatus("decode-0", "decode", "ready", load, block_tokens=16, model="demo")]
    for index in range(2):
        samples = await both.samples(index)
        assert samples["baton:worker_total_blocks", ""] == 7 and samples["vllm:num_preemptions_total", ""] == 100
        assert ("baton:worker_total_blocks", "0") not in samples


async def test_a_proxy_that_is_down_is_left_out(pair: Pair, folder: Path) -> None:
    """Guards the metrics of the proxies that run while one restarts."""
    async with answering(pair, folder, 1):
        await pair.complete(1)
        samples = await pair.samples(1)
    assert samples["vllm:e2e_request_latency_seconds_count", "1"] == 1
    assert ("baton:proxy_up", "0") not in samples and samples["baton:proxy_up", "1"] == 1


async def test_a_past_request_is_found_at_any_proxy(both: Pair) -> None:
    """Guards /debug/requests, which reaches a proxy that may not have served the request."""
    request_id = await both.complete(1)
    for index in range(2):
        async with both.client(index) as client:
            assert (await client.get(f"/debug/requests/{request_id}")).json()["id"] == request_id
            assert (await client.get("/debug/requests/no%0dsuch")).status_code == 404
    samples = await both.samples(0)
    assert [samples.get(("baton:request_failures_total", proxy)) for proxy in "01"] == [1, 1], (
        "one each: its own client's"
    )


async def test_an_adapter_that_was_loaded_at_one_proxy_is_known_to_the_other(both: Pair, folder: Path) -> None:
    """Guards clients of the port, whose next connection reaches any of them."""
    write_adapter(folder / "a", ModelConfig.from_folder(DEMO), rank=1)
    for path, body, seen in (
        ("load", {"lora_name": "mine", "lora_path": "a"}, ["demo", "mine"]),
        ("unload", {"lora_name": "mine"}, ["demo"]),
    ):
        async with both.client(0) as client:
            assert (await client.post(f"/v1/{path}_lora_adapter", json=body)).status_code == 200
        async with both.client(1) as client:
            assert [each["id"] for each in (await client.get("/v1/models")).json()["data"]] == seen


async def test_the_network_does_not_reach_what_needs_no_key(both: Pair) -> None:
    """Guards the routes for other proxies, which ask for no key."""
    async with both.client(0) as client:
        for path in ("/metrics/own", "/metrics/reported", "/adapters/read"):
            assert (await client.get(path)).status_code == 404
        assert (await client.get("/metrics", headers={"authorization": ""})).status_code == 401


def test_proxies_divide_limits_and_have_names() -> None:
    """Guards an overloaded cluster against N times the queue, and logs against proxies of one name."""
    one, last = ProxySettings(), ProxySettings(proxies=3, proxy_index=2, group_folder=Path("g"))
    assert (one.name, one.share_of(512), last.name) == ("proxy", 512, "proxy-2")
    assert last.share_of(512) == 171 and last.share_of(1) == 1


@pytest.mark.parametrize(
    "given",
    [
        {"proxies": 2},
        {"proxies": 2, "group_folder": Path("g"), "proxy_index": 2},
        {"proxies": 2, "group_folder": Path("g"), "port": 0},
    ],
)
def test_half_of_a_group_is_refused(given: dict[str, object]) -> None:
    """Guards against a proxy that shares a port with others and is not asked by them."""
    with pytest.raises(SettingsError):
        ProxySettings(**given)  # type: ignore[arg-type]
    assert ApiSettings().proxies == 1
