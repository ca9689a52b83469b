"""Runs the processes of one machine as children: shows their output, restarts what dies, leaves nothing behind.

It owns child processes and knows no role: the caller gives what to run, and the test for "ready". Each child leads a
process group of its own, so a Ctrl-C on the terminal reaches only the supervisor, which then drains the children.
On Linux the kernel kills the children when the supervisor dies (prctl(2), PR_SET_PDEATHSIG), but for those that shall
outlive it (node/orphan.py).
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import re
import signal
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from baton.node.private_files import private_opener

Say = Callable[[str], None]

TAIL_LINES = 20
MAX_LINE_BYTES = 16 << 10
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildSpec:
    """One process to run. Children of one `group` can replace each other: while one of them runs, the group lives."""

    name: str
    group: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    needed: bool = True
    """Whether all ends when no child of its group is left."""
    outlives: Path | None = None
    """The child outlives the supervisor: its standard input is a pipe that ends with the supervisor, and its output
    goes to this file, as a pipe would break. None: it ends with the supervisor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorLimits:
    """Timeouts and bounds of the supervisor."""

    start_s: float = 600.0
    """From the start of the children until all serve: loading weights from a slow disk takes minutes."""
    grace_s: float = 30.0
    """From SIGTERM to SIGKILL."""
    max_restarts: int = 5
    """Of one child within `restart_window_s`; after one more exit it is given up."""
    restart_window_s: float = 60.0
    restart_delay_s: float = 0.5
    """Before the first restart; doubled for each further one in the window."""
    report_s: float = 5.0
    """Between two lines that say what the start waits for."""


class Supervisor:
    """Starts, watches and stops children; see `run`. Made and used in the main thread, in one event loop.

    (The kernel counts the death of the *thread* that started a child as the death of its parent.)
    """

    def __init__(self, specs: Sequence[ChildSpec], say: Say, limits: SupervisorLimits | None = None) -> None:
        self._say = say
        self._limits = limits or SupervisorLimits()
        self._children = [_Child(spec, say) for spec in specs]
        self._tasks: dict[asyncio.Task[None], _Child] = {}  # each ends when it gives its child up
        self._stop = asyncio.Event()
        self._kill = asyncio.Event()
        self._changed = asyncio.Event()
        """There are more children."""
        self._serving = False

    def stop(self) -> None:
        """Drain and end. A second call kills at once."""
        if self._stop.is_set():
            self._kill.set()
        self._stop.set()

    def pids(self) -> dict[str, int]:
        """Process ids of the children that run, by name."""
        return {child.spec.name: pid for child in self._children if (pid := child.pid)}

    def names(self) -> set[str]:
        """Of the children that have not ended for good."""
        return {child.spec.name for task, child in self._tasks.items() if not task.done()}

    def add(self, spec: ChildSpec) -> None:
        """Run one more child, as those since the start; no other of its name may be left."""
        assert spec.name not in self.names(), spec.name
        self._tasks = {task: child for task, child in self._tasks.items() if child.spec.name != spec.name}
        child = _Child(spec, self._say)
        self._children = [each for each in self._children if each.spec.name != spec.name] + [child]
        self._tasks[asyncio.create_task(self._run_child(child))] = child
        self._changed.set()

    def retire(self, name: str) -> None:
        """Let a child end, by SIGTERM, and start it no more."""
        for child in self._children:
            if child.spec.name == name:
                child.retired = True
                child.send(signal.SIGTERM)

    def send(self, group: str, signum: int) -> bool:
        """Send a signal to the children of a group, not to what they have started; False until all children serve."""
        if self._serving:
            for child in self._children:
                if child.spec.group == group:
                    child.send(signum)
        return self._serving

    async def run(self, ready: Callable[[], Awaitable[str]], on_ready: Callable[[], None]) -> int:
        """Run the children until `stop` is called or a group is given up; returns the exit status.

        `ready` returns an empty string once the children serve, else what is still missing; it is called repeatedly,
        must not block the loop, and bounds its own waits. Until then any exit of a child ends the start.
        """
        self._tasks = {asyncio.create_task(self._run_child(child)): child for child in self._children}
        starting = asyncio.create_task(self._await_ready(ready))
        stopping = asyncio.create_task(self._stop.wait())
        failed = False
        try:
            await asyncio.wait([starting, stopping, *self._tasks], return_when=asyncio.FIRST_COMPLETED)
            if starting.done() and starting.result():
                self._serving = True
                on_ready()
                failed = await self._serve(stopping)
            else:
                failed = not self._stop.is_set()
            return 1 if failed else 0
        finally:
            starting.cancel()
            await self._end(list(self._tasks))
            stopping.cancel()

    async def _await_ready(self, ready: Callable[[], Awaitable[str]]) -> bool:
        """Call `ready` until nothing is missing; False when the time is up."""
        loop = asyncio.get_running_loop()
        started = reported = loop.time()
        while missing := await ready():
            now = loop.time()
            if now - started > self._limits.start_s:
                self._say(f"not ready after {self._limits.start_s:.0f} s: {missing}")
                return False
            if now - reported >= self._limits.report_s:
                self._say(f"waiting ({now - started:.0f} s): {missing}")
                reported = now
            await asyncio.sleep(0.1)
        return True

    async def _serve(self, stopping: asyncio.Task[bool]) -> bool:
        """Until stopped; True if a group has no child left."""
        while not self._stop.is_set():
            pending = {task for task in self._tasks if not task.done()}
            changed = asyncio.create_task(self._changed.wait())
            await asyncio.wait([stopping, changed, *pending], return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()
            self._changed.clear()
            alive = {child.spec.group for task, child in self._tasks.items() if not task.done()}
            lost = {child.spec.group for child in self._tasks.values() if child.spec.needed} - alive
            if lost and not self._stop.is_set():
                self._say(f"giving up: no {' and no '.join(sorted(lost))} process is left")
                return True
        return False

    async def _run_child(self, child: _Child) -> None:
        """Run one child, again and again while serving, until it is given up or all stop."""
        clock = asyncio.get_running_loop().time
        restarts: deque[float] = deque()
        while True:
            status = await child.run(self._stop)
            if self._stop.is_set():
                return
            if child.retired:
                self._say(f"{child.spec.name} ended ({_describe_status(status)})")
                return
            if not self._serving:
                self._say(f"{child.spec.name} ended during the start ({_describe_status(status)}); its last lines:")
                for line in child.tail:
                    self._say(f"    {line}")
                return
            while restarts and clock() - restarts[0] > self._limits.restart_window_s:
                restarts.popleft()
            if len(restarts) >= self._limits.max_restarts:
                self._say(
                    f"{child.spec.name} ended ({_describe_status(status)}) after {len(restarts)} restarts: given up"
                )
                return
            delay_s = self._limits.restart_delay_s * 2 ** len(restarts)
            self._say(f"{child.spec.name} ended ({_describe_status(status)}); restart in {delay_s:.1f} s")
            if await _wait_for(self._stop, delay_s):
                return
            restarts.append(clock())

    async def _end(self, tasks: list[asyncio.Task[None]]) -> None:
        """SIGTERM; SIGKILL when the grace time is over or at a second `stop`; returns when all are gone."""
        self._stop.set()
        for child in self._children:
            child.signal(signal.SIGTERM)
        kill = asyncio.create_task(_wait_for(self._kill, self._limits.grace_s))
        gone = asyncio.create_task(asyncio.wait(tasks))
        try:
            await asyncio.wait([kill, gone], return_when=asyncio.FIRST_COMPLETED)
        finally:
            kill.cancel()
            for child in self._children:
                if child.signal(signal.SIGKILL):
                    self._say(f"{child.spec.name} killed: it had not ended in time")
        await asyncio.wait([gone], timeout=10.0)  # what was killed is gone at once, unless it hangs in the kernel
        for task in tasks:
            if task.done() and (error := task.exception()) is not None:
                raise error


class _Child:
    """One process at a time of one spec, with its process group."""

    def __init__(self, spec: ChildSpec, say: Say) -> None:
        self.spec = spec
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.retired = False
        """Its end is wanted."""
        self._say = say
        self._process: asyncio.subprocess.Process | None = None

    async def run(self, stop: asyncio.Event) -> int | str:
        """Start the process and wait for its end; its exit status, or why it could not start."""
        self.tail.clear()
        try:
            process = await (self._start() if self.spec.outlives is None else self._start_free(self.spec.outlives))
        except OSError as error:
            return str(error)
        self._process = process
        if stop.is_set():  # it came while the process was being made
            self.signal(signal.SIGTERM)
        pump = asyncio.create_task(self._pump(process.stdout)) if process.stdout is not None else None
        status = await process.wait()
        signal_group(process.pid, signal.SIGKILL)  # what the process itself may have left behind
        if pump is not None:
            await asyncio.wait([pump], timeout=1.0)
            pump.cancel()
        self._process = None
        return status

    async def _start(self) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *self.spec.argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=dict(self.spec.env),
            process_group=0,
            preexec_fn=tether(os.getpid()),
        )

    async def _start_free(self, output: Path) -> asyncio.subprocess.Process:
        with open(output, "ab", opener=private_opener) as file:
            return await asyncio.create_subprocess_exec(
                *self.spec.argv,
                stdin=asyncio.subprocess.PIPE,
                stdout=file,
                stderr=file,
                env=dict(self.spec.env),
                process_group=0,
            )

    @property
    def pid(self) -> int:
        """0 where nothing runs."""
        return self._process.pid if self._process is not None else 0

    def signal(self, signum: int) -> bool:
        """Send a signal to the group of the running process; False where nothing runs."""
        return (
            self._process is not None and self._process.returncode is None and signal_group(self._process.pid, signum)
        )

    def send(self, signum: int) -> None:
        """Send a signal to the running process alone."""
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signum)

    async def _pump(self, stream: asyncio.StreamReader) -> None:
        """Pass the output on line by line; a progress bar's carriage return ends a line too."""
        rest = b""
        while chunk := await stream.read(64 << 10):
            *lines, rest = re.split(rb"[\r\n]+", rest + chunk)
            if len(rest) > MAX_LINE_BYTES:
                lines, rest = [*lines, rest], b""
            for line in lines:
                self._show(line)
        self._show(rest)

    def _show(self, line: bytes) -> None:
        if line:
            text = line.decode(errors="backslashreplace")
            self.tail.append(text)
            self._say(f"[{self.spec.name}] {text}")


def tether(parent_pid: int) -> Callable[[], None] | None:
    """What a child does before exec, so that it cannot outlive its parent; None where the system cannot do it."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)  # loaded here: after the fork only the call is made

    def tie() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent_pid:  # the parent died before the call
            os._exit(1)

    return tie


def signal_group(pgid: int, signum: int) -> bool:
    try:
        os.killpg(pgid, signum)
    except (ProcessLookupError, PermissionError):  # macOS says EPERM for a group of zombies
        return False
    return True


async def _wait_for(event: asyncio.Event, timeout_s: float) -> bool:
    """Whether `event` is set within the time."""
    try:
        async with asyncio.timeout(timeout_s):
            return await event.wait()
    except TimeoutError:
        return False


def _describe_status(status: int | str) -> str:
    """An exit status in words."""
    if isinstance(status, str):
        return status
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
