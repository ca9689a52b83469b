"""Names of adapters that outlive a proxy, and that proxies share: one file, one order, no second winner."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from baton.node.adapter_folder import AdapterFacts
from baton.node.errors import BadRequest, SettingsError
from baton.proxy.adapter_changes import AdapterChanges
from baton.proxy.adapter_names import AdapterNames, NamedAdapter, named_adapter
from baton.proxy.adapter_state import AdapterState, NameChange
from baton.proxy.group import Alone


class OtherProxies(Alone):
    """A group whose proxies read the file where another asks them to."""

    def __init__(self) -> None:
        self.members: list[AdapterChanges] = []

    async def visit(self, path: str) -> None:
        for each in self.members:
            await each.follow()


class Proxy:
    """Names, and what changes them, as one proxy has them."""

    def __init__(self, root: Path, group: OtherProxies, *modules: NamedAdapter, model: str = "demo") -> None:
        self.names = AdapterNames(("demo",))
        for each in modules:
            self.names.add_module(each)
        self.changes = AdapterChanges(self.names, model, root, AdapterState(root / "state.json"), group)
        group.members.append(self.changes)

    @property
    def digests(self) -> dict[str, bytes]:
        return {each.name: each.adapter.ref.digest[:1] for each in self.names}


Start = Callable[..., Proxy]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """start(*modules) is one more proxy."""
    group = OtherProxies()
    return lambda *modules, **options: Proxy(tmp_path, group, *modules, **options)


@pytest.fixture
def named(tmp_path: Path) -> Callable[[str, str], NamedAdapter]:
    """named(name, content) is an adapter whose digest is that letter."""
    return lambda name, content: named_adapter(
        name, "demo", content, tmp_path / content, AdapterFacts(content.encode() * 32, 8, 1000)
    )


Named = Callable[[str, str], NamedAdapter]


async def test_a_change_counts_at_every_proxy_before_it_is_answered(start: Start, named: Named) -> None:
    one, two = start(), start()
    await one.changes.put(named("sql", "a"), in_place=False)
    assert one.digests == two.digests == {"sql": b"a"}
    with pytest.raises(BadRequest, match="load_inplace"):
        await two.changes.put(named("sql", "b"), in_place=False)
    await two.changes.put(named("sql", "b"), in_place=True)
    assert one.digests == two.digests == {"sql": b"b"}
    await one.changes.remove("sql")
    assert one.digests == two.digests == {}
    with pytest.raises(BadRequest, match="no adapter is loaded"):
        await two.changes.remove("sql")


async def test_a_race_of_two_loads_has_one_winner_everywhere(start: Start, named: Named) -> None:
    proxies = [start() for _ in range(3)]
    loads = [
        each.changes.put(named("sql", content), in_place=False) for each, content in zip(proxies, "abc", strict=True)
    ]
    outcomes = await asyncio.gather(*loads, return_exceptions=True)
    assert sorted(type(each).__name__ for each in outcomes) == ["BadRequest", "BadRequest", "NoneType"]
    assert all(each.digests == {"sql": "abc"[outcomes.index(None)].encode()} for each in proxies)


async def test_the_lock_is_held_until_a_change_is_written_though_its_request_is_gone(
    start: Start, named: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the file at the end of a proxy: two writers would share the new one that replaces it."""
    one, other = start(), start()
    writes, may_end, order = threading.Event(), threading.Event(), []
    write = AdapterState.write

    def slow(state: AdapterState, changes: Sequence[NameChange]) -> None:
        if not writes.is_set():
            writes.set()
            may_end.wait(60)
            order.append("first")
        else:
            order.append("second")
        write(state, changes)

    monkeypatch.setattr(AdapterState, "write", slow)
    gone = asyncio.create_task(one.changes.put(named("sql", "a"), in_place=False))
    await asyncio.to_thread(writes.wait, 60)
    gone.cancel()
    next_one = asyncio.create_task(other.changes.put(named("more", "b"), in_place=False))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not gone.done()
    may_end.set()
    await next_one
    assert gone.cancelled() and order == ["first", "second"]
    assert other.digests == {"sql": b"a", "more": b"b"}


async def test_names_outlive_a_proxy(start: Start, named: Named) -> None:
    """Also the generations that were counted of a name, as long as its proxy lives."""
    before = start(named("fixed", "f"), named("gone", "g"))
    await before.changes.put(named("sql", "a"), in_place=False)
    before.names.get("sql").usage.begun = 3
    await before.changes.put(named("sql", "b"), in_place=True)
    await before.changes.put(named("fixed", "c"), in_place=True)
    await before.changes.remove("gone")
    assert before.names.get("sql").usage.begun == 3
    after = start(named("fixed", "f"), named("gone", "g"))
    await after.changes.start()
    assert after.digests == {"fixed": b"c", "sql": b"b"}
    kept = after.names.get("sql")
    assert replace(kept, usage=before.names.get("sql").usage) == before.names.get("sql")


async def test_newer_modules_count_more_than_older_changes(
    start: Start, named: Named, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards a deployment of new --lora-modules against what was loaded in place of the old ones."""
    await start(named("sql", "1")).changes.put(named("sql", "2"), in_place=True)
    after = start(named("sql", "3"))
    await after.changes.start()
    assert after.digests == {"sql": b"3"}
    assert "--lora-modules have changed" in caplog.text
    await after.changes.put(named("sql", "4"), in_place=True)
    again = start(named("sql", "3"))
    await again.changes.start()
    assert again.digests == {"sql": b"4"}


async def test_models_that_share_a_file_have_names_of_their_own(start: Start, named: Named) -> None:
    one, other = start(), start(model="other")
    await one.changes.put(named("sql", "a"), in_place=False)
    await other.changes.put(named("sql", "b"), in_place=False)
    await other.changes.put(named("more", "c"), in_place=False)
    assert (one.digests, other.digests) == ({"sql": b"a"}, {"sql": b"b", "more": b"c"})


async def test_a_change_that_was_not_announced_is_found(tmp_path: Path, start: Start, named: Named) -> None:
    """By a proxy on another host, or one that was frozen."""
    far = Proxy(tmp_path, OtherProxies())
    task = asyncio.create_task(far.changes.watch(poll_s=0.0))
    await start().changes.put(named("sql", "a"), in_place=False)
    async with asyncio.timeout(60):
        while not far.digests:
            await asyncio.sleep(0)
    task.cancel()
    assert far.digests == {"sql": b"a"}


async def test_folders_outside_the_root_do_not_count(tmp_path: Path, start: Start, named: Named) -> None:
    await start().changes.put(named("sql", "a"), in_place=False)
    narrower = AdapterNames()
    state = AdapterState(tmp_path / "state.json")
    (tmp_path / "b").mkdir()
    await AdapterChanges(narrower, "demo", tmp_path / "b", state, Alone()).start()
    assert not len(narrower)


BROKEN = {
    "cut off": lambda text: text[:-9],
    "empty": lambda text: "",
    "of another program": lambda text: '{"names": []}',
    "of the future": lambda text: text.replace('"version": 1', '"version": 2'),
    "no digest": lambda text: text.replace("61" * 32, "61" * 31),
    "a rank that is text": lambda text: text.replace('"rank": 8', '"rank": "8"'),
    "nested": lambda text: "[" * 100_000,
}


@pytest.mark.parametrize("name", BROKEN)
async def test_a_broken_file_stops_the_start_and_is_not_overwritten(
    name: str, tmp_path: Path, start: Start, named: Named
) -> None:
    """Guards the names in it: a proxy that began without them would lose them with its first change."""
    proxy = start()
    await proxy.changes.put(named("sql", "a"), in_place=False)
    path = tmp_path / "state.json"
    assert path.stat().st_mode & 0o777 == 0o600
    broken = BROKEN[name](path.read_text())
    path.write_text(broken)
    with pytest.raises(SettingsError, match=r"--adapter-state .*state\.json: "):
        await start().changes.start()
    with pytest.raises(SettingsError):
        await proxy.changes.put(named("more", "b"), in_place=False)
    assert (path.read_text(), proxy.digests) == (broken, {"sql": b"a"})


async def test_a_file_that_others_can_change_is_not_read(tmp_path: Path, start: Start, named: Named) -> None:
    await start().changes.put(named("sql", "a"), in_place=False)
    (tmp_path / "state.json").chmod(0o666)
    with pytest.raises(SettingsError, match="other users can change it"):
        await start().changes.start()
    (tmp_path / "state.json").unlink()
    os.mkfifo(tmp_path / "state.json", 0o600)
    with pytest.raises(SettingsError, match="not a regular file"):
        await start().changes.start()


async def test_a_file_system_without_locks_is_an_error_of_the_option(
    start: Start, named: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    with pytest.raises(SettingsError, match="cannot be locked: No locks available"):
        await start().changes.put(named("sql", "a"), in_place=False)


async def test_the_event_loop_waits_for_no_file(start: Start, named: Named, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards all streams of a proxy whose --adapter-state lies on a file system of the network that hangs."""
    here, threads = threading.get_ident(), []

    def noted(work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            threads.append(threading.get_ident())
            return work(*args, **options)

        return call

    proxy = start()
    for module, name in ((os, "open"), (os, "close"), (fcntl, "flock")):
        monkeypatch.setattr(module, name, noted(getattr(module, name)))
    await proxy.changes.put(named("sql", "a"), in_place=False)
    assert len(threads) > 3 and here not in threads


async def test_a_lock_is_let_go_where_its_request_leaves_while_it_is_taken(
    start: Start, named: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards changes of all proxies after one request whose client was impatient: the lock would be held for ever."""
    one, other = start(), start()
    takes, may_end = threading.Event(), threading.Event()
    flock = fcntl.flock

    def slow(fd: int, operation: int) -> None:
        flock(fd, operation)
        takes.set()
        may_end.wait(60)

    monkeypatch.setattr(fcntl, "flock", slow)
    gone = asyncio.create_task(one.changes.put(named("sql", "a"), in_place=False))
    await asyncio.to_thread(takes.wait, 60)
    gone.cancel()
    may_end.set()
    await asyncio.wait([gone])
    await other.changes.put(named("sql", "b"), in_place=False)
    assert gone.cancelled() and other.digests == {"sql": b"b"}


async def test_a_file_that_cannot_be_written_leaves_the_names(tmp_path: Path, start: Start, named: Named) -> None:
    proxy = start()
    (tmp_path / "state.json.new").mkdir()
    with pytest.raises(SettingsError, match="cannot be written"):
        await proxy.changes.put(named("sql", "a"), in_place=False)
    assert proxy.digests == {}
    with pytest.raises(SettingsError, match="no room for 10001 names"):
        AdapterState(tmp_path / "state.json").write([NameChange(name=str(n), model="demo") for n in range(10_001)])
    with pytest.raises(SettingsError, match="no folder that this process can write in"):
        AdapterState(tmp_path / "missing" / "state.json").check()
