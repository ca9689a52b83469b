"""node.orphan: what happens to a node when the pipe from what started it ends."""

from __future__ import annotations

import signal
import subprocess
import sys

PROGRAM = """
import signal
from baton.node.orphan import watch_starter
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR1])
watch_starter({orphan_s}, lambda: print("orphaned", flush=True))
print("started", flush=True)
print(signal.sigwait([signal.SIGTERM, signal.SIGUSR1]).name)
"""


def _start(orphan_s: float | None) -> subprocess.Popen[str]:
    argv = [sys.executable, "-P", "-c", PROGRAM.format(orphan_s=orphan_s)]
    child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "started\n"
    return child


def test_an_orphan_drains_when_its_time_is_up() -> None:
    """Guards a host from nodes that nothing else will ever end."""
    output, _ = _start(0.0).communicate(timeout=60)  # closes its standard input
    assert output == "orphaned\nSIGTERM\n"


def test_standard_input_is_not_looked_at_unless_asked() -> None:
    """Guards a node that is started by hand, or by a service manager that gives it /dev/null."""
    child = _start(None)
    assert child.stdin is not None
    child.stdin.close()
    child.send_signal(signal.SIGUSR1)
    assert child.stdout is not None and child.stdout.read() == "SIGUSR1\n"
    child.wait(60)
