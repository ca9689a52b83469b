"""The names of adapters: which adapter requests mean that name it as their model.

Names belong to the proxy; workers know adapters by their content alone. A request keeps the adapter that it has found,
whatever becomes of the name. It reads folders, and asks no worker.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from baton.node.adapter_folder import AdapterFacts, read_facts
from baton.node.errors import AdapterError, BadRequest, SettingsError
from baton.node.messages.control import AdapterRef
from baton.node.telemetry import excerpt
from baton.proxy.adapter_state import MAX_CHANGES, KeptAdapter
from baton.proxy.metrics.adapters import AdapterUsage
from baton.proxy.routing.adapter_places import RequestAdapter

MAX_NAMES = MAX_CHANGES
MAX_NAME_CHARACTERS = 256


@dataclass(frozen=True, slots=True)
class NamedAdapter:
    """An adapter under one of its names."""

    name: str
    parent: str
    """The model that it adapts, by the name under which it is served."""
    root: str
    """Where it was read, as it was asked for."""
    created: int
    adapter: RequestAdapter
    usage: AdapterUsage
    """Of the name: it goes on where the name means another adapter."""


@dataclass(frozen=True, slots=True)
class LoraModule:
    """A value of --lora-modules."""

    name: str
    path: str


class AdapterNames:
    """Adapters by name: those of --lora-modules, as changed since. `taken`: names of models, which no adapter has."""

    def __init__(self, taken: Collection[str] = ()) -> None:
        self._taken = frozenset(taken)
        self._modules: dict[str, NamedAdapter] = {}
        self._by_name: dict[str, NamedAdapter] = {}

    def __len__(self) -> int:
        return len(self._by_name)

    def __iter__(self) -> Iterator[NamedAdapter]:
        return iter(self._by_name.values())

    def find(self, name: str) -> NamedAdapter | None:
        return self._by_name.get(name)

    def get(self, name: str) -> NamedAdapter:
        """Raises BadRequest (404)."""
        if (found := self._by_name.get(name)) is None:
            message = f"no adapter is loaded as `{name[:128]}`"
            raise BadRequest(message, status=404, param="lora_name", code="model_not_found")
        return found

    def check(self, name: str, digest: bytes, *, in_place: bool) -> None:
        """Raises BadRequest where the name cannot mean this adapter from now on."""
        known = self._by_name.get(name)
        if not name.strip() or not name.isprintable() or len(name) > MAX_NAME_CHARACTERS:
            message = f"lora_name must be 1 to {MAX_NAME_CHARACTERS} printable characters"
            raise BadRequest(message, param="lora_name")
        if name in self._taken:
            raise BadRequest(f"`{name}` is the name of a model", param="lora_name")
        if known is None and len(self._by_name) >= MAX_NAMES:
            raise BadRequest(f"there are {MAX_NAMES} adapters already", param="lora_name")
        if known is not None and known.adapter.ref.digest != digest and not in_place:
            message = f"another adapter is loaded as `{name}`; load_inplace replaces it"
            raise BadRequest(message, status=409, param="lora_name", code="adapter_exists")

    def add_module(self, named: NamedAdapter) -> None:
        """One of --lora-modules, before any change."""
        self._modules[named.name] = self._by_name[named.name] = named

    def module_digest(self, name: str) -> bytes | None:
        """Of the adapter that --lora-modules give the name."""
        module = self._modules.get(name)
        return None if module is None else module.adapter.ref.digest

    def change(self, changes: Mapping[str, NamedAdapter | None]) -> None:
        """The names are those of --lora-modules with these changes from now on, and no others; None: it is gone."""
        found = {name: changes.get(name, named) for name, named in self._modules.items()} | dict(changes)
        before = self._by_name
        self._by_name = {
            name: replace(named, usage=before[name].usage) if name in before else named
            for name, named in found.items()
            if named is not None and name not in self._taken
        }


def named_adapter(name: str, parent: str, root: str, folder: Path, facts: AdapterFacts) -> NamedAdapter:
    adapter = RequestAdapter(AdapterRef(facts.digest, str(folder)), facts.rank, facts.size_bytes)
    return NamedAdapter(name, parent, root, int(time.time()), adapter, AdapterUsage())


def adapter_of(name: str, parent: str, kept: KeptAdapter) -> NamedAdapter:
    """An adapter that was loaded under a name, perhaps by another proxy. Workers compare the digest with the folder."""
    adapter = RequestAdapter(AdapterRef(bytes.fromhex(kept.digest), kept.folder), kept.rank, kept.size_bytes)
    return NamedAdapter(name, parent, kept.path, kept.created, adapter, AdapterUsage())


def folder_inside(root: Path, path: str) -> Path:
    """The folder that a client names, absolute or below `root`, with all links resolved. Raises BadRequest where it, or
    a file of it, lies outside."""
    message = f"lora_path must be a folder inside --adapter-root, with all of its files; `{excerpt(path)}` is none"
    outside = BadRequest(message, param="lora_path")
    try:
        own = root.resolve(strict=True)
        folder = (own / path).resolve(strict=True)
        files = [each.resolve(strict=True) for each in folder.iterdir()] if folder.is_relative_to(own) else []
    except (OSError, ValueError, RuntimeError):  # it is not there, or its links lead in a circle
        raise outside from None
    if not folder.is_relative_to(own) or not all(each.is_relative_to(own) for each in files):
        raise outside
    return folder


def modules_of(values: Sequence[str], models: Sequence[str]) -> AdapterNames:
    """The names of --lora-modules, whose folders are read now. Raises SettingsError."""
    names = AdapterNames(models)
    for value in values:
        module = _module(value)
        folder = Path(module.path).expanduser().resolve()
        try:
            facts = read_facts(folder)
            if names.find(module.name) is not None:
                raise SettingsError(f"--lora-modules: {module.name} is there twice")
            names.check(module.name, facts.digest, in_place=False)
        except (AdapterError, BadRequest) as error:
            raise SettingsError(f"--lora-modules {excerpt(value)}: {error}") from None
        names.add_module(named_adapter(module.name, models[0], module.path, folder, facts))
    return names


def _module(value: str) -> LoraModule:
    """NAME=PATH, or an object of JSON with name and path, as vLLM takes them."""
    wrong = SettingsError(f"--lora-modules {excerpt(value)}: NAME=PATH, or JSON with name and path")
    if value.startswith("{"):
        try:
            fields = json.loads(value)
        except (ValueError, RecursionError):
            raise wrong from None
        name, path = fields.get("name"), fields.get("path")
        if (
            fields.keys() - {"name", "path", "base_model_name"}
            or not isinstance(name, str)
            or not isinstance(path, str)
        ):
            raise wrong
        return LoraModule(name, path)
    name, equals, path = value.partition("=")
    if not equals or not name or not path:
        raise wrong
    return LoraModule(name, path)
