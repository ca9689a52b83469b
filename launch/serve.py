"""The command `serve`: runs the plan of `launch.local` under the supervisor, and says when a token has come through.

It owns the probe for "ready", the lines that a user reads, and the exit status. How children are started, watched and
stopped is the supervisor's.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import shlex
import signal
import socket
import ssl
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from baton.launch.autoscale import Bounds, follow
from baton.launch.check import check_folder
from baton.launch.gpus import describe, visible_gpus
from baton.launch.local import (
    Ports,
    ServeSettings,
    folder_options,
    node_environment,
    place_workers,
    plan_nodes,
    scheme,
    served_name,
    sizes_pools,
    worker_names,
)
from baton.launch.other_options import OPTIONS_OF_OTHERS
from baton.launch.run_folder import RunFolder
from baton.launch.supervisor import ChildSpec, Say, Supervisor, SupervisorLimits
from baton.launch.terminal import Screen, has_terminal
from baton.node import local_http
from baton.node.api_settings import ApiSettings, api_keys, check_files
from baton.node.errors import SettingsError
from baton.node.local_http import proxy_socket
from baton.node.modelhub import locate_model
from baton.node.settings import parse, require_loopback
from baton.node.tls import own_server_context

PROBE_TIMEOUT_S = 30.0
METRICS_TIMEOUT_S = 10.0
WORKER_ROLES = ("prefill", "decode", "mixed")


def check_port(host: str, port: int) -> None:
    """Raise SettingsError where nothing can listen at `host:port`."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise SettingsError(f"cannot listen on {host}:{port}: {error.strerror}; choose another with --port") from None


def token_probe(host: str, port: int, api_key: str, tls: bool = False) -> Callable[[], Awaitable[str]]:
    """A probe that asks the proxy for one real token; it returns what is missing."""
    context = own_server_context() if tls else None

    async def probe() -> str:
        status = await http_status(host, port, "/health_generate", PROBE_TIMEOUT_S, api_key, context)
        if status == 0:
            return "the proxy does not answer yet"
        if status == 401:
            return "the proxy refuses the key of the probe: set it with --api-key or BATON_API_KEY, not --proxy-arg"
        return "" if status == 200 else f"no token yet: the workers load the model (HTTP {status})"

    return probe


def group_probe(folder: Path, num_proxies: int) -> Callable[[], Awaitable[str]]:
    """The same for several proxies at one port: each is asked at its own socket, where it needs no key, until it has
    had a token."""
    missing = list(range(num_proxies))

    async def probe() -> str:
        while missing:
            status, _ = await local_http.get(proxy_socket(folder, missing[0]), "/health_generate", PROBE_TIMEOUT_S)
            if status != 200:
                return f"no token yet from proxy-{missing[0]}" + (f" (HTTP {status})" if status else "")
            del missing[0]
        return ""

    return probe


async def http_status(
    host: str, port: int, path: str, timeout_s: float, api_key: str = "", context: ssl.SSLContext | None = None
) -> int:
    """The status of GET `path`; 0 where no answer came in time."""
    key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host, port, ssl=context)
            try:
                writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n{key}Connection: close\r\n\r\n".encode())
                parts = (await reader.readline()).split()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return 0
    return int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else 0


def curl_line(settings: ApiSettings, model: str, url: str) -> str:
    """A command to paste."""
    body = json.dumps({"model": model, "prompt": "Once upon a time", "max_tokens": 64})
    key = (
        " -H 'authorization: Bearer YOUR_KEY'" if settings.api_key or settings.api_key_file or settings.tenants else ""
    )
    insecure = "-k " if settings.tls_cert else ""  # the certificate names the public host
    return f"curl {insecure}{url}/v1/completions -H 'content-type: application/json'{key} -d {shlex.quote(body)}"


def metrics_reader(settings: ServeSettings, host: str, api_key: str) -> Callable[[], Awaitable[str]]:
    """Reads the proxy's page of metrics; "" where no answer comes."""
    context = own_server_context() if settings.tls_cert is not None else None

    def read() -> str:
        connection: http.client.HTTPConnection = (
            http.client.HTTPConnection(host, settings.port, timeout=METRICS_TIMEOUT_S)
            if context is None
            else http.client.HTTPSConnection(host, settings.port, timeout=METRICS_TIMEOUT_S, context=context)
        )
        try:
            connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {api_key}"} if api_key else {})
            answer = connection.getresponse()
            return answer.read().decode(errors="replace") if answer.status == 200 else ""
        except (OSError, http.client.HTTPException):
            return ""
        finally:
            connection.close()

    return lambda: asyncio.to_thread(read)


def plan(settings: ServeSettings, ports: Ports, say: Say) -> list[ChildSpec]:
    """The processes to run, or that an autoscaler may start; says what each worker gets of a GPU."""
    settings = settings.largest
    gpus = visible_gpus(os.environ) if settings.device != "cpu" else []
    placements = place_workers(settings, len(gpus))
    for line in describe(placements, gpus, sizes_pools(settings)):
        say(line)
    return plan_nodes(settings, ports, placements, os.environ)


async def supervise(settings: ServeSettings, ports: Ports, specs: Sequence[ChildSpec], say: Say) -> int:
    """Run `specs` until Ctrl-C, SIGTERM or a closed terminal; the exit status."""
    any_host = settings.host in ("", "0.0.0.0", "::")
    host = "127.0.0.1" if any_host else settings.host
    url = f"{scheme(settings)}://{f'[{host}]' if ':' in host else host}:{settings.port}"
    names = {name for _, name in worker_names(settings)}
    workers = [spec for spec in specs if spec.group in WORKER_ROLES]
    first = [spec for spec in specs if spec not in workers or spec.name in names]
    supervisor = Supervisor(first, say, SupervisorLimits(start_s=settings.start_timeout_s, grace_s=settings.grace_s))
    key = next(iter(api_keys(settings)), "")
    followers: list[asyncio.Task[None]] = []

    def on_signal() -> None:
        say("stopping: running requests get to their end (Ctrl-C again to kill)")
        supervisor.stop()

    def on_ready() -> None:
        say(f"ready {url}")
        say(curl_line(settings, served_name(settings), url))
        if settings.autoscale:
            read, bounds = metrics_reader(settings, host, key), Bounds(settings.min, settings.max)
            followers.append(asyncio.ensure_future(follow(read, supervisor, workers, bounds, say)))

    at_terminal = has_terminal()

    def on_hangup() -> None:
        if settings.tenants is None or (at_terminal and not has_terminal()):
            on_signal()  # the terminal was closed
        else:
            read = supervisor.send("proxy", signal.SIGHUP)
            say("reading --tenants again" if read else "SIGHUP comes too early: the proxy is starting")

    loop = asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, on_signal)
    loop.add_signal_handler(signal.SIGHUP, on_hangup)
    one = token_probe(host, settings.port, key, settings.tls_cert is not None)
    probe = one if ports.group_folder is None else group_probe(ports.group_folder, settings.proxies)
    try:
        status = await supervisor.run(probe, on_ready)
    finally:
        for follower in followers:
            follower.cancel()
    say("stopped")
    return status


def main(argv: Sequence[str]) -> int:
    """The exit status; an error of settings is one line."""
    settings = parse(
        ServeSettings,
        argv,
        prog="baton serve",
        description="Serve a model on this machine.",
        hints=OPTIONS_OF_OTHERS,
    )
    screen = Screen()
    try:
        require_loopback(settings.host, settings.insecure_network)
        check_port(settings.host, settings.port)
        check_files(settings)
        model = locate_model(settings.model, screen.say)  # once, before every child looks for it
        check_folder(model, folder_options(settings), node_environment(settings, os.environ), settings.chat_template)
        with RunFolder() as folder:
            ports = Ports.free(settings, folder)
            return asyncio.run(supervise(settings, ports, plan(settings, ports, screen.say), screen.say))
    except SettingsError as error:
        print(f"baton serve: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        screen.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
