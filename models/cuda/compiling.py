"""When kernels are compiled ahead, in how many processes, and what is said about it.

Nothing depends on it: kernels that are not compiled ahead are compiled at their first launch, one after the other.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable

from baton.node.telemetry import log_event

logger = logging.getLogger("models")

MOST_PROCESSES = 8
KERNELS_A_PROCESS = 4
"""Compiling fewer takes no longer than starting a process for them."""
TIMEOUT_S = 120.0


def processes_for(num_kernels: int, cores: int) -> int:
    """Half of the cores: another worker on this host may start, too. 0: compiling ahead does not pay."""
    processes = min(MOST_PROCESSES, cores // 2, num_kernels // KERNELS_A_PROCESS)
    return processes if processes > 1 else 0


def compile_ahead(run: Callable[[], None]) -> None:
    """Have Triton's cache on disk hold the kernels that `run` launches; `run` is called, with launches that do nothing.

    Raises nothing: what `run` raises, it will raise again when it is run in earnest.
    """
    began_at = time.monotonic()
    try:
        # It stands on Triton's inside: a Triton without that costs the time, and not the worker.
        from baton.kernels.triton.compiling import compile_all, launched_by, missing

        kernels = launched_by(run)
        absent = missing(kernels)
        rehearsed_at = time.monotonic()
        log_event(
            logger,
            "steps_rehearsed",
            kernels=len(kernels),
            missing=len(absent),
            took_s=round(rehearsed_at - began_at, 2),
        )
        processes = processes_for(len(absent), len(os.sched_getaffinity(0)))
        if not processes:
            return
        compile_all(kernels, processes, TIMEOUT_S)
        log_event(
            logger,
            "kernels_compiled",
            kernels=len(absent),
            failed=len(missing(absent)),
            processes=processes,
            took_s=round(time.monotonic() - rehearsed_at, 1),
        )
    except Exception as error:  # Triton's inside may be another one, a process may not start
        log_event(logger, "kernels_not_compiled_ahead", level=logging.WARNING, reason=repr(error))
