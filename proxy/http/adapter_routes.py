"""The routes that load and unload adapters while the server runs, in vLLM's forms; for administrators (http.guard).

A name means an adapter once workers have it, at each proxy of the port. Requests that began under the name before keep
what they have found.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ConfigDict

from baton.node.adapter_folder import read_facts
from baton.node.errors import AdapterError, BadRequest, Overloaded, SettingsError
from baton.node.telemetry import log_event
from baton.proxy.adapter_changes import AdapterChanges
from baton.proxy.adapter_names import folder_inside, named_adapter
from baton.proxy.http.guard import tenant_of
from baton.proxy.http.schema import parse
from baton.proxy.http.service import Service

logger = logging.getLogger("proxy")

LOAD_TIMEOUT_S = 120.0
MAX_PATH_CHARACTERS = 2048


class LoadBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    lora_name: str
    lora_int_id: int | None = None
    """vLLM's; means nothing here."""


def add_adapter_routes(app: FastAPI, service: Service) -> None:
    one_load = asyncio.Lock()

    @app.post("/v1/load_lora_adapter")
    async def load(request: Request) -> Response:
        async with service.body(request.scope, request.receive, tenant_of(request.scope)) as body:
            asked = parse(LoadBody, body.content)
        changes, root = _changes_of(service)
        async with one_load:
            await _load(service, asked, changes, root)
        return Response(f"Success: LoRA adapter '{asked.lora_name}' added successfully.", media_type="text/plain")

    @app.post("/v1/unload_lora_adapter")
    async def unload(request: Request) -> Response:
        async with service.body(request.scope, request.receive, tenant_of(request.scope)) as body:
            asked = parse(UnloadBody, body.content)
        changes, _ = _changes_of(service)
        with _unusable_state():
            found = await changes.remove(asked.lora_name)
        log_event(logger, "adapter_unloaded", name=found.name, digest=found.adapter.ref.digest.hex()[:12])
        return Response(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.", media_type="text/plain")


def _changes_of(service: Service) -> tuple[AdapterChanges, Path]:
    changes, root = service.adapter_changes, service.settings.adapter_root
    if changes is None or root is None:
        raise BadRequest("adapters are loaded only below --adapter-root, which is not set", code="adapters_fixed")
    return changes, root


@contextmanager
def _unusable_state() -> Iterator[None]:
    """The administrator, who asks, is the one that can mend it."""
    try:
        yield
    except SettingsError as error:
        raise Overloaded(str(error), status=503) from None


async def _load(service: Service, asked: LoadBody, changes: AdapterChanges, root: Path) -> None:
    if not asked.lora_path or len(asked.lora_path) > MAX_PATH_CHARACTERS or "\0" in asked.lora_path:
        raise BadRequest("lora_path is no path", param="lora_path")
    folder = await asyncio.to_thread(folder_inside, root, asked.lora_path)
    try:
        facts = await asyncio.to_thread(read_facts, folder)
    except AdapterError as error:
        raise BadRequest(str(error), param="lora_path") from None
    service.adapters.check(asked.lora_name, facts.digest, in_place=asked.load_inplace)
    named = named_adapter(asked.lora_name, service.default_model.name, asked.lora_path, folder, facts)
    await service.engine.load_adapter(named.parent, named.adapter, timeout_s=LOAD_TIMEOUT_S)
    with _unusable_state():
        await changes.put(named, in_place=asked.load_inplace)
    log_event(logger, "adapter_loaded", name=named.name, digest=facts.digest.hex()[:12], rank=facts.rank)
