"""What a worker's process does: start, serve until SIGTERM has drained the worker, clean up."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable
from typing import Protocol, TypeVar

from baton.node.errors import SettingsError
from baton.node.garbage import freeze_startup_objects
from baton.node.messages.base import Role
from baton.node.telemetry import configure_logging, log_event
from baton.worker.build_cpu import choose_device
from baton.worker.settings import WorkerSettings
from baton.worker.startup import Worker, start

logger = logging.getLogger("worker")

SWITCH_S = 0.0002
"""A thread that wants the interpreter waits for it so long. The loop launches a GPU's kernels for milliseconds without
a pause, while messages and transfers, of other threads, are short."""

S = TypeVar("S", bound=WorkerSettings)


class Loop(Protocol):
    """The loop of a worker."""

    def run(self) -> None: ...

    def drain(self) -> None: ...

    def check(self) -> None: ...


def serve(role: Role, given: S, make: Callable[[Worker, S], Loop]) -> int:
    """Run one worker to its end; returns the exit status: 0 drained, 1 could not start or was refused."""
    configure_logging(given.log_level, given.worker_id or role)
    sys.setswitchinterval(SWITCH_S)
    try:
        device = choose_device(given.device)
        settings = given.for_device(device)
        worker = start(settings, device, role)
    except SettingsError as error:
        return _complain(role, error)
    try:
        loop = make(worker, settings)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: loop.drain())
        freeze_startup_objects()
        loop.run()
        loop.check()
    except SettingsError as error:
        return _complain(role, error)
    finally:
        worker.close()
    log_event(logger, "worker_stopped", role=role)
    return 0


def _complain(role: str, error: SettingsError) -> int:
    print(f"{role}: {error}", file=sys.stderr)
    return 1
