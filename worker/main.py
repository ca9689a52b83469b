"""What a worker's process does: start, serve until SIGTERM has drained the worker, clean up."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable

from baton.node.errors import SettingsError
from baton.node.garbage import freeze_startup_objects
from baton.node.host import NODE_FILES, allow_files
from baton.node.messages.base import Role
from baton.node.orphan import watch_starter
from baton.node.probe import NodeState, NoProbes, Probes, open_probes
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
    allow_files(NODE_FILES)
    try:
        with open_probes(settings.probe_port, settings.bind) as probes:
            return _serve(role, settings, make_loop, probes)
    except SettingsError as error:
        print(f"{role}: {error}", file=sys.stderr)
        return 1


def _serve(
    role: Role, settings: WorkerSettings, make_loop: Callable[[Parts, str], Loop], probes: Probes | NoProbes
) -> int:
    device = choose_device(settings.device)
    worker = start(settings, device, role)
    try:
        loop = make_loop(worker.parts, device)
        probes.watch(lambda: NodeState(min(loop.turned_at, worker.io.turned_at), worker.io.unready))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: worker.io.terminate())
        watch_starter(settings.orphan_s, worker.io.orphan)
        freeze_startup_objects()
        loop.run()
        loop.check()
    finally:
        worker.close()
    log_event(logger, "worker_stopped", role=role)
    return 0
