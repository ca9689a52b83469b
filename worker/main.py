"""What a worker's process does: start, serve until SIGTERM has drained the worker, clean up."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable

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


def serve(role: Role, settings: WorkerSettings, make_loop: Callable[[Parts, str], Loop]) -> int:
    """Run one worker to its end; `make_loop` gets its parts and device. Returns the exit status: 0 drained, 1 could not
    start or was refused."""
    configure_logging(settings.log_level, settings.worker_id or role)
    sys.setswitchinterval(SWITCH_S)
    try:
        device = choose_device(settings.device)
        worker = start(settings, device, role)
    except SettingsError as error:
        return _print_error(role, error)
    try:
        loop = make_loop(worker.parts, device)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: worker.io.terminate())
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
