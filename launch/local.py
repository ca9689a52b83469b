"""Serves a model on this machine: one proxy, N prefill and N decode workers and a KV store as child processes.

It owns the command lines of the roles and the test for "ready": a token has come back through all of them. How children
are started, watched and ended is node.supervisor's.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shlex
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from baton.launch.supervisor import ChildSpec, Patience, Supervisor
from baton.node.errors import SettingsError
from baton.node.modelhub import DEMO_MODEL, locate_model
from baton.node.settings import option, parse, require_loopback

PROBE_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """What `scripts/serve` is told; the rest is the roles' own default."""

    model: str = option(
        DEMO_MODEL, metavar="FOLDER_OR_HUB_ID", help="the demo model, a Hugging Face model folder, or a hub id org/name"
    )
    served_model_name: str = option("", help="name of the model in the API; not given: the folder's, or the hub id")
    host: str = option("127.0.0.1", help="address of the HTTP API")
    port: int = option(8000, help="port of the HTTP API", minimum=1, maximum=65535)
    prefill: int = option(1, help="prefill workers; 0: the decode workers prefill too", minimum=0, maximum=64)
    decode: int = option(1, help="decode workers", minimum=1, maximum=64)
    device: str = option("auto", help="where the model runs", choices=("auto", "cpu", "cuda"))
    gpus: tuple[int, ...] = option(
        (), metavar="N", help="GPUs that the workers take in turns, prefill workers first; not given: the first for all"
    )
    local_prefill: str | None = option(
        None,
        help="which prompts decode workers prefill themselves; not given: those that would otherwise wait too long",
        choices=("never", "short", "auto", "always"),
    )
    store_ram_gib: float = option(0.25, unit="GiB", help="RAM of the KV store that workers share; 0: none", minimum=0)
    store_disk_gib: float = option(0.0, unit="GiB", help="disk of the KV store, for each model; 0: none", minimum=0)
    store_path: Path = option(Path("kvstore"), metavar="FOLDER", help="where the KV store keeps blocks on disk")
    api_key: str = option("", help="key that clients must send", env="BATON_API_KEY")
    insecure_network: bool = option(False, help="allow a --host that other machines can reach")
    proxy_arg: tuple[str, ...] = option(
        (), metavar="ARGUMENT", help="passed on to the proxy, as in --proxy-arg=--log-level=debug"
    )
    worker_arg: tuple[str, ...] = option(
        (), metavar="ARGUMENT", help="passed on to each worker, as in --worker-arg=--num-blocks=512"
    )
    start_timeout_s: float = option(600.0, unit="s", help="time until the first token must have come", minimum=1)
    grace_s: float = option(45.0, unit="s", help="time until what has not drained is killed", minimum=0)


def roles(settings: ServeSettings, control_port: int, store_port: int, environ: Mapping[str, str]) -> list[ChildSpec]:
    """The processes to run; the proxy's control socket and the store are at these ports, workers choose their own."""
    store = f"tcp://127.0.0.1:{store_port}" if settings.store_ram_gib else ""
    control = f"tcp://127.0.0.1:{control_port}"
    env = {**environ, "PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "passive"}
    env.setdefault("OMP_NUM_THREADS", str(threads_a_worker(len(_cores()), settings.prefill + settings.decode)))
    local_prefill = settings.local_prefill or ("" if settings.prefill else "always")
    proxy = [
        *("--model", settings.model, "--served-model-name", served_name(settings)),
        *("--host", settings.host, "--port", str(settings.port), "--control-address", control),
        *(("--local-prefill", local_prefill) if local_prefill else ()),
        *(("--insecure-network",) if settings.insecure_network else ()),
        *settings.proxy_arg,
    ]
    specs = [_role("proxy", "proxy", proxy, env | ({"BATON_API_KEY": settings.api_key} if settings.api_key else {}))]
    if store:
        specs.append(_store(settings, control, store, env))
    names = [("prefill", index) for index in range(settings.prefill)]
    names += [("decode", index) for index in range(settings.decode)]
    for number, (role, index) in enumerate(names):
        name = f"{role}-{index}"
        worker = ["--model", settings.model, "--proxy", control, "--device", settings.device, "--worker-id", name]
        gpu = ["--gpu", str(settings.gpus[number % len(settings.gpus)])] if settings.gpus else []
        shared = ["--store", store] if store else []
        specs.append(_role(name, role, [*worker, *gpu, *shared, *settings.worker_arg], env))
    return specs


def _store(settings: ServeSettings, control: str, address: str, env: Mapping[str, str]) -> ChildSpec:
    """Nobody's request needs it, so the rest goes on where it cannot be kept alive."""
    disk = ["--disk-gib", str(settings.store_disk_gib), "--path", str(settings.store_path)]
    argv = [
        *(sys.executable, "-P", "-m", "baton.kvtransfer", "--store-id", "store", "--proxy", control, "--bind", address),
        *("--ram-gib", str(settings.store_ram_gib)),
        *(disk if settings.store_disk_gib else ()),
    ]
    return ChildSpec(name="store", group="store", argv=tuple(argv), env=env, needed=False)


def _role(name: str, role: str, arguments: Sequence[str], env: Mapping[str, str]) -> ChildSpec:
    return ChildSpec(name=name, group=role, argv=(sys.executable, "-P", "-m", f"baton.{role}", *arguments), env=env)


def served_name(settings: ServeSettings) -> str:
    """What clients call the model."""
    if settings.served_model_name:
        return settings.served_model_name
    folder = Path(settings.model).expanduser()
    return folder.resolve().name if settings.model != DEMO_MODEL and folder.is_dir() else settings.model


def threads_a_worker(num_cores: int, num_workers: int) -> int:
    """Cores shared out evenly, one kept for the proxy; more threads than cores would wait for each other."""
    return max(1, (num_cores - 1) // num_workers)


def _cores() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def check_port(host: str, port: int) -> None:
    """Raise SettingsError where nothing can listen at `host:port`."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise SettingsError(f"cannot listen on {host}:{port}: {error.strerror}; choose another with --port") from None


def free_ports(count: int) -> list[int]:
    """So many free ports, each another."""
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return list(ports)


def free_port() -> int:
    """A free port of the loopback interface, known before the proxy binds it because workers must be told it.

    Drawn from below the range that systems hand out by themselves, so that no other process gets it in between.
    """
    for _ in range(100):
        port = 20_000 + secrets.randbelow(10_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise SettingsError("no free port between 20000 and 29999 on 127.0.0.1")


def token_probe(host: str, port: int) -> Callable[[], Awaitable[str]]:
    """What asks the proxy for one real token, and tells what is missing."""

    async def probe() -> str:
        status = await http_status(host, port, "/health_generate", PROBE_TIMEOUT_S)
        if status == 0:
            return "the proxy does not answer yet"
        return "" if status == 200 else f"no token yet: the workers load the model (HTTP {status})"

    return probe


async def http_status(host: str, port: int, path: str, timeout_s: float) -> int:
    """The status of GET `path`; 0 where no answer came in time."""
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
                parts = (await reader.readline()).split()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return 0
    return int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else 0


def curl_line(settings: ServeSettings, url: str) -> str:
    """A command to paste."""
    body = json.dumps({"model": served_name(settings), "prompt": "Once upon a time", "max_tokens": 64})
    key = " -H 'authorization: Bearer YOUR_KEY'" if settings.api_key else ""
    return f"curl {url}/v1/completions -H 'content-type: application/json'{key} -d {shlex.quote(body)}"


async def supervise(settings: ServeSettings, specs: Sequence[ChildSpec]) -> int:
    """Run `specs` until Ctrl-C, SIGTERM or a closed terminal; the exit status."""
    any_host = settings.host in ("", "0.0.0.0", "::")
    host = "127.0.0.1" if any_host else settings.host
    url = f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"
    supervisor = Supervisor(specs, say, Patience(start_s=settings.start_timeout_s, grace_s=settings.grace_s))

    def on_signal() -> None:
        say("stopping: running requests get to their end (Ctrl-C again to kill)")
        supervisor.stop()

    def on_ready() -> None:
        say(f"ready {url}")
        say(curl_line(settings, url))

    loop = asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(signum, on_signal)
    status = await supervisor.run(token_probe(host, settings.port), on_ready)
    say("stopped")
    return status


def say(line: str) -> None:
    """Print one line now: whoever reads a pipe waits for `ready`."""
    print(line, flush=True)


def main(argv: Sequence[str]) -> int:
    """The exit status; an error of settings is one line."""
    settings = parse(ServeSettings, argv, prog="scripts/serve", description="Serve a model on this machine.")
    try:
        require_loopback(settings.host, settings.insecure_network)
        check_port(settings.host, settings.port)
        locate_model(settings.model)  # once, with its progress bars, before every child looks for it
        return asyncio.run(supervise(settings, roles(settings, *free_ports(2), os.environ)))
    except SettingsError as error:
        print(f"scripts/serve: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
