"""Changes of the names of adapters while proxies run, in one order for all proxies that share --adapter-state.

A change counts when it is in the file: of two that would give a name two meanings, the second finds the first there.
The proxies at the port then read the file again before the change is answered; others that share it look once a second.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

from baton.node.errors import SettingsError
from baton.node.telemetry import log_event
from baton.proxy.adapter_names import AdapterNames, NamedAdapter, adapter_of
from baton.proxy.adapter_state import AdapterState, KeptAdapter, NameChange, in_thread_to_its_end
from baton.proxy.group import READ_ADAPTERS, Group

logger = logging.getLogger("proxy")

POLL_S = 1.0


class AdapterChanges:
    """What changes the names of one proxy. Lives in one event loop, and waits for no disk there."""

    def __init__(self, names: AdapterNames, model: str, root: Path, state: AdapterState, group: Group) -> None:
        """`model`: of the adapters; other models' names in the file are left alone."""
        self._names, self._model, self._root, self._state, self._group = names, model, root, state, group
        self._one_at_a_time = asyncio.Lock()

    async def put(self, named: NamedAdapter, *, in_place: bool) -> None:
        """The name means this adapter from now on. Raises BadRequest where it means another that is to stay,
        SettingsError where the file cannot be used."""
        ref = named.adapter.ref
        kept = KeptAdapter(
            path=named.root,
            folder=ref.path,
            digest=ref.digest.hex(),
            rank=named.adapter.rank,
            size_bytes=named.adapter.size_bytes,
            created=named.created,
        )
        async with self._one_at_a_time, self._state.locked():
            changes = await self._follow()
            self._names.check(named.name, ref.digest, in_place=in_place)
            known = self._names.find(named.name)
            if known is None or known.adapter.ref != ref:
                await self._write(changes, named.name, kept)
        await self._group.visit(READ_ADAPTERS)

    async def remove(self, name: str) -> NamedAdapter:
        """The name means nothing from now on. Raises BadRequest (404), or SettingsError."""
        async with self._one_at_a_time, self._state.locked():
            changes = await self._follow()
            found = self._names.get(name)
            await self._write(changes, name, None)
        await self._group.visit(READ_ADAPTERS)
        return found

    async def start(self) -> None:
        """Take the names from the file, and log those that do not count. Raises SettingsError where it is unusable."""
        await asyncio.to_thread(self._state.check)
        for each in await self.follow():
            if each.model == self._model and not self._counts(each):
                is_older = each.replaces != self._module(each.name)
                reason = "--lora-modules have changed" if is_older else "outside --adapter-root"
                log_event(logger, "adapter_change_ignored", level=logging.WARNING, name=each.name, reason=reason)

    async def follow(self) -> Sequence[NameChange]:
        """Take the names from the file. Raises SettingsError, and leaves them as they are."""
        async with self._one_at_a_time:
            return await self._follow()

    async def watch(self, poll_s: float = POLL_S) -> None:
        """Follow changes of other proxies until it is cancelled."""
        reported = ""
        while True:
            await asyncio.sleep(poll_s)
            try:
                if await asyncio.to_thread(lambda: self._state.changed):
                    await self.follow()
                reported = ""
            except SettingsError as error:
                if str(error) != reported:
                    log_event(logger, "adapter_state_unusable", level=logging.ERROR, reason=str(error))
                reported = str(error)

    async def _follow(self) -> tuple[NameChange, ...]:
        changes = await asyncio.to_thread(self._state.read)
        self._apply(changes)
        return changes

    async def _write(self, changes: Sequence[NameChange], name: str, kept: KeptAdapter | None) -> None:
        module = self._module(name)
        change = NameChange(name=name, model=self._model, replaces=module, adapter=kept)
        places = [place for place, each in enumerate(changes) if (each.model, each.name) == (self._model, name)]
        written = list(changes)
        if kept is None and module is None:
            written = [each for place, each in enumerate(changes) if place not in places]
        elif places:
            written[places[0]] = change
        else:
            written.append(change)
        await in_thread_to_its_end(lambda: self._state.write(written))
        await self._follow()

    def _apply(self, changes: Sequence[NameChange]) -> None:
        counting = {each.name: each.adapter for each in changes if each.model == self._model and self._counts(each)}
        self._names.change(
            {name: None if kept is None else adapter_of(name, self._model, kept) for name, kept in counting.items()}
        )

    def _counts(self, change: NameChange) -> bool:
        """Of what --lora-modules say now, and inside --adapter-root as it is now."""
        folder = self._root if change.adapter is None else Path(change.adapter.folder)
        is_inside = folder.is_relative_to(self._root) and ".." not in folder.parts
        return change.replaces == self._module(change.name) and is_inside

    def _module(self, name: str) -> str | None:
        """The digest of what --lora-modules give the name, as the file has it."""
        digest = self._names.module_digest(name)
        return None if digest is None else digest.hex()
