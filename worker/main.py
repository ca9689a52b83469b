"""What a worker's process does: start, serve until SIGTERM has drained the worker, clean up."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable
from typing import TypeVar

from baton.node.errors import SettingsError
from baton.node.garbage import freeze_startup_objects
from baton.node.messages.base import Role
from baton.node.telemetry import configure_logging, log_event
from baton.worker.build_cpu import choose_device
from baton.worker.loop import Loop
from baton.worker.parts import Parts
from baton.worker.settings import WorkerSettings
from baton.worker.startup import start

logger = logging.getLogger("worker")

SWITCH_S = 0.0002
"""How long a thread waits for the interpreter before it asks for it. The loop launches a GPU's kernels for milliseconds
without a pause, while messages and transfers, of other threads, are short."""

S = TypeVar("S", bound=WorkerSettings)


def serve(role: Role, given: S, make_loop: Callable[[Parts, S], Loop]) -> int:
    """Run one worker to its end; returns the exit status: 0 drained, 1 could not start or was refused."""
    configure_logging(given.log_level, given.worker_id or role)
    sys.setswitchinterval(SWITCH_S)
    try:
        device = choose_device(given.device)
        settings = given.for_device(device)
        worker = start(settings, device, role)
    except SettingsError as error:
        return _print_error(role, error)
    try:
        loop = make_loop(worker.parts, settings)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: loop.drain())
        freeze_startup_objects()
        loop.run()
        loop.check()
    except SettingsError as error:
        return _print_error(role, error)
    finally:
        worker.close()
    log_event(logger, "worker_stopped", role=role)
    return 0


def _print_error(role: str, error: SettingsError) -> int:
    print(f"{role}: {error}", file=sys.stderr)
    return 1
