"""Names of adapters, and the folders that may be loaded."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from baton.models.config import ModelConfig
from baton.node.errors import BadRequest, SettingsError
from baton.node.messages.control import AdapterLoaded, AdapterRef, Load, LoadAdapter
from baton.proxy.adapter_loads import AdapterLoads
from baton.proxy.adapter_names import folder_inside, modules_of
from baton.proxy.adapter_warming import warm_workers
from baton.proxy.interface import WorkerStatus
from baton.testing.adapter_folders import write_adapter
from baton.testing.fake_engine import FakeEngine

DEMO = Path(__file__).parents[3] / "models" / "demo"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("root") / "a", ModelConfig.from_folder(DEMO), rank=1)


def test_modules_are_named_as_with_vllm(folder: Path) -> None:
    names = modules_of([f"a={folder}", f'{{"name": "b", "path": "{folder}", "base_model_name": "x"}}'], ["demo"])
    assert [(each.name, each.parent, each.root) for each in names] == [(name, "demo", str(folder)) for name in "ab"]
    assert len({each.adapter.ref for each in names}) == 1, "one content is one adapter"


@pytest.mark.parametrize(
    "value", ["a", "=x", "a=", "{", '{"name": "a"}', '{"name": "a", "path": "b", "more": 1}', "demo={}", "a=/"]
)
def test_wrong_modules_are_errors_of_settings(value: str, folder: Path) -> None:
    with pytest.raises(SettingsError, match="--lora-modules"):
        modules_of([value.replace("{}", str(folder))], ["demo"])


def test_a_name_is_there_once(folder: Path) -> None:
    with pytest.raises(SettingsError, match="twice"):
        modules_of([f"a={folder}", f"a={folder}"], ["demo"])


def test_folders_lie_inside_the_root_with_all_their_files(folder: Path, tmp_path: Path) -> None:
    """Guards against a request that makes the server read files elsewhere: by .., an absolute path, or a link."""
    root = folder.parent
    assert folder_inside(root, "a") == folder_inside(root, str(folder)) == folder.resolve()
    (root / "out").symlink_to(tmp_path)
    (root / "circle").symlink_to(root / "circle")
    linked = root / "linked"
    linked.mkdir()
    (tmp_path / "secret").write_text("x")
    (linked / "adapter_model.safetensors").symlink_to(tmp_path / "secret")
    for path in ("..", "../..", str(tmp_path), "out", "linked", "circle", "missing", "a/adapter_config.json", "a\0"):
        with pytest.raises(BadRequest, match="inside --adapter-root"):
            folder_inside(root, path)


async def test_workers_that_join_are_warmed(folder: Path) -> None:
    """Also one that comes back under its name: it has nothing any more."""
    engine = FakeEngine(lambda call: [])
    names = modules_of([f"a={folder}", f"b={folder}"], ["demo"])
    task = asyncio.create_task(warm_workers(engine, names, poll_s=0.0))

    async def loaded_with(*workers: str) -> int:
        engine.adapters.clear()
        engine.workers[:] = [WorkerStatus(name, "decode", "ready", Load(), max_loras=4) for name in workers]
        for _ in range(20):
            await asyncio.sleep(0)
        return len(engine.adapters)

    assert [await loaded_with(), await loaded_with("d"), await loaded_with("d"), await loaded_with("d", "p")] == [
        0,
        2,
        0,
        2,
    ]
    engine.adapter_failure = BadRequest("no")
    await loaded_with("p")
    engine.adapter_failure = None
    assert await loaded_with("d", "p") == 2
    task.cancel()


async def test_a_load_ends_with_the_answers_the_losses_or_the_time() -> None:
    """Guards against a request for an adapter that waits for a worker that is gone."""
    sent: list[tuple[str, LoadAdapter]] = []
    loads = AdapterLoads(lambda worker, message: sent.append((worker, message)) or True)  # type: ignore[func-returns-value]
    ref = AdapterRef(b"a" * 32, "/a")
    task = asyncio.create_task(loads.load(["w", "x", "y"], ref, timeout_s=60))
    await asyncio.sleep(0)
    assert [worker for worker, _ in sent] == ["w", "x", "y"]
    loads.on_loaded("w", AdapterLoaded(digest=ref.digest))
    loads.on_loaded("stranger", AdapterLoaded(digest=ref.digest))
    loads.on_loaded("x", AdapterLoaded(digest=ref.digest, error="no"))
    loads.on_lost("y")
    assert await task == {"w": "", "x": "no"}
    assert await loads.load(["w"], ref, timeout_s=0) == {}
    assert not loads._awaited
