"""A node that outlives what started it, where that is wanted: it serves on for a while, and then drains.

What starts the node holds the other end of its standard input, a pipe, and writes nothing. Its end is the end of the
pipe, whichever way it came. (A launcher whose nodes shall end with it ties them to itself instead: launch/supervisor.)
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from baton.node.telemetry import log_event

logger = logging.getLogger("orphan")

ORPHAN_HELP = (
    "standard input is a pipe from what starts this node: when it ends, serve on for so long, then drain; default: do "
    "not look at it"
)
READ_BYTES = 4096


def watch_starter(orphan_s: float | None, on_orphaned: Callable[[], None]) -> None:
    """Call `on_orphaned` from a thread when standard input ends, and send this process SIGTERM `orphan_s` later. None:
    do neither."""
    if orphan_s is not None:
        threading.Thread(
            target=_watch, args=(sys.stdin.fileno(), orphan_s, on_orphaned), name="starter", daemon=True
        ).start()


def _watch(pipe: int, orphan_s: float, on_orphaned: Callable[[], None]) -> None:
    while os.read(pipe, READ_BYTES):
        pass
    log_event(logger, "orphaned", level=logging.WARNING, drains_in_s=orphan_s)
    on_orphaned()
    time.sleep(orphan_s)
    os.kill(os.getpid(), signal.SIGTERM)
