"""Child processes that measure, and what Linux says of processes: CPU time, memory, parents.

A measuring child reads one JSON request a line from standard input and answers with one JSON line on standard output.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

STOP_TIMEOUT_S = 30.0


def child_environment(**variables: str) -> dict[str, str]:
    """The environment of this process with `variables` set. Idle OpenMP threads sleep: others measure beside them."""
    return {**os.environ, "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false", **variables}


def program(*arguments: str) -> list[str]:
    """The command line of `baton bench ARGUMENTS`."""
    return [sys.executable, "-P", "-m", "baton.benchmark", *arguments]


class MeasuringChild:
    """A child process `baton bench ARGUMENTS` that answers JSON requests. Killed on leaving the context."""

    def __init__(self, *arguments: str, environment: dict[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            program(*arguments), env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, request: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def receive(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a measuring process has ended: {self._process.args!r}")
        return json.loads(line)

    def ask(self, request: object) -> Any:
        self.send(request)
        return self.receive()

    def close(self) -> None:
        """Let it end by itself: its input ends."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(STOP_TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait(STOP_TIMEOUT_S)


def answer_requests(answer: Callable[[Any], object]) -> None:
    """The loop of a measuring child, until its input ends."""
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


# -- /proc


def peak_memory_mb(pid: int) -> float:
    """Peak resident memory in MB of 10**6 bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    return int(status["VmHWM"].split()[0]) * 1024 / 1e6


def cpu_s(pids: Iterable[int]) -> float:
    """CPU time that processes have used, user and kernel."""
    stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(stat[11]) + int(stat[12]) for stat in stats) / os.sysconf("SC_CLK_TCK")


def busy_s() -> float:
    """CPU time of everything on this machine since its start, stolen time included."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def machine_text() -> str:
    """Architecture, cores and date: the last line of a report."""
    return f"{platform.machine()}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}"
