"""Adapters at the API, over an engine without workers: names, models, and requests that name them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from baton.models.config import ModelConfig
from baton.node.adapter_folder import read_facts
from baton.node.errors import BadRequest
from baton.proxy.http.app import create_app
from baton.proxy.interface import AppSettings
from baton.proxy.metrics.adapters import MAX_SHOWN, AdapterCollector, AdapterUsage
from baton.proxy.text.model_text import ModelText
from baton.testing.adapter_folders import write_adapter
from baton.testing.fake_engine import FakeEngine

DEMO = Path(__file__).parents[4] / "models" / "demo"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made, config = tmp_path_factory.mktemp("root"), ModelConfig.from_folder(DEMO)
    for seed, name in enumerate(("a", "b")):
        write_adapter(made / name, config, rank=1, seed=seed)
    return made


@pytest.fixture
def app_settings(root: Path, tmp_path: Path) -> AppSettings:
    return AppSettings(adapter_root=root, adapter_state=tmp_path / "names.json", api_keys=("admin",))


@pytest.fixture
async def client(engine: FakeEngine, text: ModelText, app_settings: AppSettings) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(engine, {"demo": text}, app_settings), raise_app_exceptions=False)
    headers = {"authorization": "Bearer admin"}
    async with httpx.AsyncClient(transport=transport, base_url="http://proxy", headers=headers) as made:
        yield made


Post = Callable[..., Any]


@pytest.fixture
def post(client: httpx.AsyncClient) -> Post:
    return lambda path, **body: client.post(f"/v1/{path}", json=body)


async def test_a_loaded_adapter_is_a_model(
    client: httpx.AsyncClient, post: Post, engine: FakeEngine, root: Path
) -> None:
    """Guards the way of a name: listed with its parent, in the answer, and as a digest at the engine."""
    assert (await post("completions", model="mine", prompt="Hi")).status_code == 404
    answer = await post("load_lora_adapter", lora_name="mine", lora_path="a")
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'mine' added successfully.")
    shown = (await client.get("/v1/models/mine")).json()
    assert (shown["id"], shown["parent"], shown["root"]) == ("mine", "demo", "a")
    assert [each["id"] for each in (await client.get("/v1/models")).json()["data"]] == ["demo", "mine"]
    for path, body in (
        ("completions", {"prompt": "Hi"}),
        ("chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
    ):
        assert (await post(path, model="mine", **body)).json()["model"] == "mine"
        generation = engine.calls[-1].generation
        assert (generation.model, generation.adapter) == ("demo", engine.adapters[0])
    assert engine.adapters[0].ref.digest == read_facts(root / "a").digest
    await post("completions", model="demo", prompt="Hi")
    assert engine.calls[-1].generation.adapter is None


async def test_a_name_is_replaced_only_in_place(post: Post, engine: FakeEngine) -> None:
    assert (await post("load_lora_adapter", lora_name="mine", lora_path="a")).status_code == 200
    assert (await post("load_lora_adapter", lora_name="mine", lora_path="a")).status_code == 200
    other = await post("load_lora_adapter", lora_name="mine", lora_path="b")
    assert (other.status_code, other.json()["error"]["param"]) == (409, "lora_name")
    assert (await post("load_lora_adapter", lora_name="mine", lora_path="b", load_inplace=True)).status_code == 200
    await post("completions", model="mine", prompt="Hi")
    assert engine.calls[-1].generation.adapter == engine.adapters[-1] != engine.adapters[0]


async def test_an_unloaded_name_is_gone(post: Post) -> None:
    await post("load_lora_adapter", lora_name="mine", lora_path="a")
    assert (await post("unload_lora_adapter", lora_name="mine", lora_int_id=3)).status_code == 200
    assert (await post("unload_lora_adapter", lora_name="mine")).status_code == 404
    assert (await post("completions", model="mine", prompt="Hi")).json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"lora_path": "a"}, "lora_name"),
        ({"lora_name": "mine"}, "lora_path"),
        ({"lora_name": "demo", "lora_path": "a"}, "lora_name"),
        ({"lora_name": " ", "lora_path": "a"}, "lora_name"),
        ({"lora_name": "mine", "lora_path": "../a"}, "lora_path"),
        ({"lora_name": "mine", "lora_path": "/etc"}, "lora_path"),
        ({"lora_name": "mine", "lora_path": "."}, "lora_path"),
        ({"lora_name": "mine", "lora_path": "a", "load_inplace": "yes"}, "load_inplace"),
    ],
)
async def test_wrong_bodies_name_the_parameter(
    post: Post, body: dict[str, Any], param: str, engine: FakeEngine
) -> None:
    answer = await post("load_lora_adapter", **body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert not engine.adapters


async def test_an_adapter_that_workers_refuse_has_no_name(post: Post, engine: FakeEngine) -> None:
    engine.adapter_failure = BadRequest("worker d: tensor x: is bad", param="lora_path")
    assert "tensor x: is bad" in (await post("load_lora_adapter", lora_name="mine", lora_path="a")).text
    assert (await post("completions", model="mine", prompt="Hi")).status_code == 404


async def test_loading_needs_a_key(client: httpx.AsyncClient) -> None:
    """Guards against clients that fill a server's memory, or read which folders there are."""
    for path in ("load_lora_adapter", "unload_lora_adapter"):
        answer = await client.post(f"/v1/{path}", json={}, headers={"authorization": "Bearer other"})
        assert answer.status_code == 401


async def test_generations_are_counted_by_adapter(client: httpx.AsyncClient, post: Post) -> None:
    """Under bounded labels; what is unloaded goes."""
    await post("load_lora_adapter", lora_name="mine", lora_path="a")
    await post("completions", model="mine", prompt="Hi", n=2)
    page = (await client.get("/metrics")).text
    assert 'baton:adapter_generations_total{adapter="mine"} 2.0' in page
    assert 'vllm:lora_requests_info{max_lora="0",running_lora_adapters="",waiting_lora_adapters=""}' in page
    await post("unload_lora_adapter", lora_name="mine")
    assert 'adapter="mine"' not in (await client.get("/metrics")).text


def test_many_adapters_share_a_label() -> None:
    names = [SimpleNamespace(name=f"a{number}", usage=AdapterUsage(number)) for number in range(MAX_SHOWN + 3)]
    collector = AdapterCollector(FakeEngine(lambda call: []), names, unix_time=lambda: 1.0)
    begun = next(each for each in collector.collect() if each.name == "baton:adapter_generations")
    assert len(begun.samples) == MAX_SHOWN + 1
    assert sum(each.value for each in begun.samples) == sum(range(MAX_SHOWN + 3))


async def test_adapters_may_be_fixed_at_the_start(engine: FakeEngine, text: ModelText) -> None:
    transport = httpx.ASGITransport(create_app(engine, {"demo": text}, AppSettings()), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://proxy") as client:
        answer = await client.post("/v1/load_lora_adapter", json={"lora_name": "mine", "lora_path": "a"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "adapters_fixed")


async def test_an_unusable_file_of_names_is_the_answer(post: Post, app_settings: AppSettings) -> None:
    """The administrator learns what to mend; the names stay."""
    assert app_settings.adapter_state is not None
    await post("load_lora_adapter", lora_name="mine", lora_path="a")
    app_settings.adapter_state.write_text("{")
    for path, body in (("load", {"lora_name": "more", "lora_path": "b"}), ("unload", {"lora_name": "mine"})):
        answer = await post(f"{path}_lora_adapter", **body)
        assert answer.status_code == 503 and "--adapter-state" in answer.json()["error"]["message"]
    assert (await post("completions", model="mine", prompt="Hi")).status_code == 200
