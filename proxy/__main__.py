"""python -m baton.proxy: the HTTP front and the scheduler of a cluster."""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import uvicorn
from uvicorn.loops.auto import auto_loop_factory

from baton import __version__
from baton.node.api_settings import api_keys, check_files
from baton.node.credentials import link_credentials
from baton.node.endpoint import Endpoint
from baton.node.errors import SettingsError
from baton.node.garbage import collect_rarely, freeze_startup_objects
from baton.node.host import NODE_FILES, allow_files
from baton.node.local_http import proxy_socket, require_private
from baton.node.modelhub import locate_model
from baton.node.orphan import watch_starter
from baton.node.settings import is_from_environment, is_loopback_host, parse, require_loopback
from baton.node.sockets import Context
from baton.node.telemetry import configure_logging, log_event
from baton.node.tls import server_context
from baton.proxy.adapter_names import modules_of
from baton.proxy.adapter_warming import warm_workers
from baton.proxy.control import BYTES_A_TURN
from baton.proxy.dispatcher import Dispatcher
from baton.proxy.group import Alone, Group, SharedPort
from baton.proxy.http.app import app_of, group_app_of
from baton.proxy.http.connections import ConnectionLimits, Connections
from baton.proxy.http.hosts import ALL
from baton.proxy.http.pace import PacedRequests
from baton.proxy.http.protocol import bounded_protocol
from baton.proxy.http.server import BoundedServer
from baton.proxy.http.service import Service, make_service
from baton.proxy.interface import BODY_MEMORY_BYTES, AppSettings
from baton.proxy.metrics.request_log import NoSpans, Spans
from baton.proxy.settings import ProxySettings
from baton.proxy.tenants.reload import load_tenants, reload_tenants
from baton.proxy.tenants.tenants import Tenants
from baton.proxy.text.model_text import ModelText

logger = logging.getLogger("proxy")

MORE_CONNECTIONS = 256
"""Beside two for each request: probes, scrapes, dashboards."""
OTHER_FILES = 128
"""At the least: sockets to workers and stores, logs, the tokenizer's and the template's."""

KEEP_ALIVE_S = 75
"""Longer than clients and load balancers keep an idle connection (5 to 60 s): where the server closes it just as a
client uses it again, the request fails. Idle connections give way to new ones."""


def main() -> int:
    settings = parse(ProxySettings, sys.argv[1:], prog="baton proxy", description="The HTTP front of Baton.")
    configure_logging(settings.log_level, settings.name)
    try:
        with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:  # uvloop where it is installed
            return runner.run(serve(settings))
    except SettingsError as error:
        print(f"proxy: {error}", file=sys.stderr)
        return 1


async def serve(settings: ProxySettings) -> int:
    """Listen on both sides until SIGTERM or SIGINT, then let running requests end."""
    require_loopback(settings.host, settings.insecure_network)
    credentials = link_credentials("proxy", settings.secret_file, settings.insecure_network)
    check_files(settings)
    folder = locate_model(settings.model, logger.info, weights=False)
    text = ModelText(
        folder,
        chat_template=settings.chat_template,
        tool_format=settings.tool_format,
        reasoning_format=settings.reasoning_format,
    )
    listener = _listen(settings.host, settings.port, shared=settings.proxies > 1)
    name, *aliases = settings.served_model_name or (_name_of(settings.model),)
    endpoint = Endpoint(Context(credentials), settings.name, settings.control_address, bytes_a_turn=BYTES_A_TURN)
    dispatcher = Dispatcher(endpoint, settings, [name])
    adapters = modules_of(settings.lora_modules, (name, *aliases))
    app_settings = AppSettings(
        aliases=tuple(aliases),
        adapter_root=settings.adapter_root,
        adapter_state=settings.adapter_state,
        api_keys=api_keys(settings),
        cors_origins=settings.cors_origin,
        allowed_hosts=_allowed_hosts(settings),
        access_log=settings.access_log,
        max_requests=settings.share_of(settings.max_requests),
        max_body_bytes=int(settings.max_body_mib * (1 << 20)),
        body_memory_bytes=max(BODY_MEMORY_BYTES, int(2 * settings.max_body_mib * (1 << 20))),
        max_prompts=settings.max_prompts,
        max_n=settings.max_n,
        max_generations=max(1, settings.share_of(settings.max_queue) // 2),
        refuse_unknown_parameters=settings.unknown_parameters == "error",
        request_timeout_s=settings.request_timeout_s,
        slow_request_s=math.inf if settings.slow_request_s is None else settings.slow_request_s,
        debug_requests=settings.debug_requests,
        reasoning_field=settings.reasoning_field,
        version=__version__,
    )
    service = make_service(
        dispatcher,
        {name: text},
        app_settings,
        _spans(settings.otlp_endpoint),
        _group_of(settings),
        _tenants_of(settings, (name, *aliases, *(each.name for each in adapters))),
        adapters,
    )
    connections = Connections(ConnectionLimits(_max_connections(app_settings.max_requests)), service.refused)
    config = uvicorn.Config(
        PacedRequests(app_of(service), service.metrics.clock),
        http=bounded_protocol(connections),
        ws="none",
        log_config=None,
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(settings.drain_s) + 1,
    )
    server = BoundedServer(config, _tls_of(settings))
    if service.adapter_changes is not None:
        await service.adapter_changes.start()
    async with _answering_group(settings, service):
        dispatcher.start()
        watch_starter(settings.orphan_s, dispatcher.orphan)
        freeze_startup_objects()
        collect_rarely()
        task = asyncio.create_task(server.serve(sockets=[listener]))
        beside = [asyncio.create_task(warm_workers(dispatcher, adapters))]
        if service.adapter_changes is not None:
            beside.append(asyncio.create_task(service.adapter_changes.watch()))
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        if settings.tenants is not None:
            loop.add_signal_handler(signal.SIGHUP, reload_tenants, service.tenants, settings.tenants, (name, *aliases))
        await asyncio.wait({task, asyncio.create_task(stop.wait())}, return_when=asyncio.FIRST_COMPLETED)
        for each in beside:
            each.cancel()
        dispatcher.drain()
        server.should_exit = True  # it listens no more, so the kernel or a load balancer gives connections to others
        await asyncio.wait({task}, timeout=settings.drain_s)
        await dispatcher.stop()
        await task
    return 0


def _max_connections(max_requests: int) -> int:
    """Twice as many as requests, so that half of them at least run none and can be closed for others; fewer where the
    system allows fewer files. Raises this process's limit of them, also for the links of as many workers as may join: a
    connection that finds no file is accepted and closed at once."""
    wanted = 2 * max_requests + MORE_CONNECTIONS
    return max(1, min(wanted, allow_files(wanted + NODE_FILES) - OTHER_FILES))


def _tls_of(settings: ProxySettings) -> ssl.SSLContext | None:
    return None if settings.tls_cert is None else server_context(settings.tls_cert, settings.tls_key)


def _allowed_hosts(settings: ProxySettings) -> tuple[str, ...] | None:
    """Names that browsers on this machine may send requests to; None for all, where a key is needed anyway or the
    network may send them."""
    has_key = settings.tenants is not None or bool(api_keys(settings))
    if has_key or ALL in settings.allowed_host or not is_loopback_host(settings.host):
        return None
    return (settings.host, *settings.allowed_host)


def _group_of(settings: ProxySettings) -> Group:
    """The other proxies at the port. Raises SettingsError where another user could speak for them."""
    if settings.group_folder is not None:
        require_private(settings.group_folder)
    if settings.proxies == 1 or settings.group_folder is None:
        return Alone()
    return SharedPort(settings.group_folder, settings.proxy_index, settings.proxies)


def _tenants_of(settings: ProxySettings, models: Sequence[str]) -> Tenants | None:
    return None if settings.tenants is None else load_tenants(settings.tenants, models, settings.share_of)


def _spans(otlp_endpoint: str) -> Spans:
    """Where traces go. If they cannot, that is a SettingsError, or a warning where the environment asks for them."""
    if not otlp_endpoint:
        return NoSpans()
    try:
        return _otlp_spans(otlp_endpoint)
    except SettingsError as error:
        if not is_from_environment(ProxySettings, "otlp_endpoint", otlp_endpoint):
            raise
        log_event(logger, "traces_off", level=logging.WARNING, reason=str(error))
        return NoSpans()


def _otlp_spans(otlp_endpoint: str) -> Spans:
    try:
        from baton.proxy.metrics.spans import otlp_spans
    except ImportError as error:
        needed = "--otlp-endpoint needs OpenTelemetry: install baton-serve[otel]"
        raise SettingsError(f"{needed} ({error})") from None
    return otlp_spans(otlp_endpoint)


def _name_of(model: str) -> str:
    """A folder's last part; a hub id, or "demo", as it is."""
    return Path(model).resolve().name if Path(model).is_dir() else model


@asynccontextmanager
async def _answering_group(settings: ProxySettings, service: Service) -> AsyncIterator[None]:
    """Inside it, the other proxies at the port can ask this one."""
    if settings.group_folder is None:
        yield
        return
    config = uvicorn.Config(
        group_app_of(service), lifespan="off", log_config=None, access_log=False, timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(
        server.serve(sockets=[_listen_at(proxy_socket(settings.group_folder, settings.proxy_index))])
    )
    try:
        yield
    finally:
        server.should_exit = True
        await task


def _listen_at(path: Path) -> socket.socket:
    """A Unix socket in place of one that an earlier process has left."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.unlink(missing_ok=True)
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        raise SettingsError(f"cannot listen at {path}: {error.strerror or error}") from None
    return listener


def _listen(host: str, port: int, *, shared: bool) -> socket.socket:
    """Bind before anything else starts, so that a taken port is reported at once. Of a `shared` port, the kernel gives
    each connection to one of the processes that listen."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise SettingsError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    return listener


if __name__ == "__main__":
    sys.exit(main())
