"""The command `baton ray`: starts a deployment on a Ray cluster, says when a token has come through, and ends it at a
signal.

It owns the lines that a user reads and the exit status. When this process dies, the deployment stays.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from baton.launch.local import served_name_of
from baton.launch.ray.autoscale import bounds_of, metrics_page, targets
from baton.launch.ray.settings import RaySettings
from baton.launch.serve import curl_line, token_probe
from baton.node.api_settings import api_keys, check_files
from baton.node.errors import SettingsError
from baton.node.settings import parse, require_loopback

if TYPE_CHECKING:
    from baton.launch.ray.deployment import Deployment

WATCH_S = 2.0
SCALE_S = 5.0
NO_ROOM_S = 60.0
"""Until the next try where the cluster had no room."""


async def scale(deployment: Deployment, bounds: Mapping[str, tuple[int, int]], page_of: Callable[[], str]) -> float:
    """Have as many workers as the proxy asks for; returns the seconds until the next look."""
    if not bounds:
        return math.inf
    for role, target in targets(await asyncio.to_thread(page_of), bounds).items():
        if (count := deployment.count(role)) != target:
            print(f"{role} workers: {count} -> {target}", flush=True)
            try:
                await asyncio.to_thread(deployment.resize, role, target)
            except SettingsError as error:
                print(f"{role} workers: {error}", flush=True)
                return NO_ROOM_S
    return SCALE_S


async def watch(deployment: Deployment, settings: RaySettings, stop: asyncio.Event) -> bool:
    """Until `stop`; False where no token came in time. Says what becomes of each node."""
    any_host = settings.host in ("", "0.0.0.0", "::")
    host = "127.0.0.1" if any_host else settings.host
    key = next(iter(api_keys(settings)), "")
    probe = token_probe(host, settings.port, key, settings.tls_cert is not None)
    loop = asyncio.get_running_loop()
    began_at, serves = loop.time(), False
    states: dict[str, str] = {}
    scale_at = 0.0
    page_of = partial(metrics_page, host, settings.port, key, settings.tls_cert is not None)
    while not stop.is_set():
        if not serves and (serves := not await probe()):
            url = f"{'http' if settings.tls_cert is None else 'https'}://{host}:{settings.port}"
            print(
                f"ready {url}\n{curl_line(settings, served_name_of(settings.served_model_name, settings.model), url)}",
                flush=True,
            )
        if not serves and loop.time() - began_at > settings.start_timeout_s:
            return False
        for name, report in (await asyncio.to_thread(deployment.reports)).items():
            state = report if isinstance(report, str) else f"process {report.pid} on {report.host}, log {report.log}"
            if state != states.get(name):
                print(f"{name}: {state}", flush=True)
            states[name] = state
        if serves and loop.time() >= scale_at:
            scale_at = loop.time() + await scale(deployment, bounds_of(settings), page_of)
        try:
            await asyncio.wait_for(stop.wait(), WATCH_S if serves else WATCH_S / 4)
        except TimeoutError:
            continue
    return True


async def supervise(deployment: Deployment, settings: RaySettings) -> int:
    """From the first actor to the last; the exit status."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, stop.set)
    try:
        await asyncio.to_thread(deployment.start)
        served = await watch(deployment, settings, stop)
        print("stopping: running requests get to their end" if served else "no token came in time", flush=True)
        return 0 if served else 1
    finally:
        await asyncio.to_thread(deployment.stop)
        print("stopped", flush=True)


def main(argv: Sequence[str]) -> int:
    """The exit status; an error of settings is one line."""
    settings = parse(RaySettings, argv, prog="baton ray", description="Serve a model on a Ray cluster.")
    try:
        require_loopback(settings.host, settings.insecure_network)
        check_files(settings)
        if Path(settings.model).is_dir():  # actors run in folders of their own
            settings = replace(settings, model=str(Path(settings.model).resolve()))
        try:
            import ray

            from baton.launch.ray.deployment import Deployment, take_down
        except ImportError as error:
            raise SettingsError(f"Ray is not installed: install baton-serve[ray] ({error})") from None
        logging.getLogger("ray.actor").setLevel(logging.ERROR)  # it warns of detached actors in placement groups
        environment = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
        try:
            ray.init(
                address=settings.address,
                namespace="baton",
                log_to_driver=False,
                runtime_env={"env_vars": environment},
            )
        except (ConnectionError, RuntimeError) as error:
            raise SettingsError(f"no Ray cluster at {settings.address}: {error}") from None
        if settings.down:
            print(f"ended {take_down(settings.name, settings.grace_s)} actors")
            return 0
        return asyncio.run(supervise(Deployment(settings), settings))
    except SettingsError as error:
        print(f"baton ray: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
