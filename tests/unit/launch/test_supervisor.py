"""Guards launch.supervisor with real child processes: what dies is restarted within bounds, and nothing is left behind.

Children are small Python programs. Whether a process is gone is known by a named pipe that it holds open: its reader
sees the end of the file exactly when the last holder is dead, which no process id shows for sure.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from baton.launch.supervisor import ChildSpec, Supervisor, SupervisorLimits

ROOT = Path(__file__).resolve().parents[3]
WAITS = "import signal, os; print('up', os.getpid(), flush=True); signal.pause()"
IGNORES = (
    "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True)\nwhile 1: signal.pause()"
)
DRAINS = """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # pause() would miss one that comes just before it
print('up', flush=True)
signal.sigwait({signal.SIGTERM})
print('drained', flush=True)
"""


class Log:
    """The supervisor's log; `until` waits for a line."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._changed = asyncio.Event()

    def __call__(self, line: str) -> None:
        self.lines.append(line)
        self._changed.set()

    def having(self, text: str) -> list[str]:
        return [line for line in self.lines if text in line]

    async def until(self, text: str, count: int = 1) -> str:
        async with asyncio.timeout(60):
            while len(self.having(text)) < count:
                self._changed.clear()
                await self._changed.wait()
        return self.having(text)[-1]


def child(code: str, name: str = "decode-0", group: str = "decode") -> ChildSpec:
    return ChildSpec(name=name, group=group, argv=(sys.executable, "-c", code), env=dict(os.environ))


def ready_when(log: Log, text: str, count: int = 1) -> Callable[[], Awaitable[str]]:
    async def ready() -> str:
        await log.until(text, count)
        return ""

    return ready


@asynccontextmanager
async def running(
    log: Log, *specs: ChildSpec, limits: SupervisorLimits | None = None, text: str = "up", count: int = 1
) -> AsyncIterator[tuple[Supervisor, asyncio.Task[int]]]:
    """A supervisor whose children are ready."""
    supervisor = Supervisor(specs, log, limits)
    task = asyncio.create_task(supervisor.run(ready_when(log, text, count), lambda: log("READY")))
    try:
        await log.until("READY")
        yield supervisor, task
    finally:
        supervisor.stop()
        supervisor.stop()
        await task


async def finished(task: asyncio.Task[int]) -> int:
    async with asyncio.timeout(60):
        return await task


async def test_a_stop_lets_children_drain() -> None:
    """SIGKILL instead of SIGTERM would cut off every running request."""
    log = Log()
    async with running(log, child(DRAINS), child(DRAINS, "proxy", "proxy"), count=2) as (supervisor, task):
        supervisor.stop()
        assert await finished(task) == 0
    assert sorted(log.having("drained")) == ["[decode-0] drained", "[proxy] drained"]
    assert log.having("killed") == []


async def test_a_child_that_dies_at_the_start_ends_the_start_with_its_reason() -> None:
    """Waiting for a worker that is gone would hang the start, with the reason scrolled away."""
    log = Log()
    specs = [child(DRAINS, "proxy", "proxy"), child("import sys; print('no such model'); sys.exit(3)")]
    supervisor = Supervisor(specs, log)

    async def never() -> str:
        return "a token"

    assert await finished(asyncio.create_task(supervisor.run(never, lambda: log("READY")))) == 1
    assert log.having("decode-0 ended during the start (exit status 3)")
    assert "    no such model" in log.lines
    assert log.having("READY") == []


async def test_a_program_that_cannot_be_started_ends_the_start() -> None:
    """An exception out of the supervisor would leave the other children behind."""
    log = Log()
    spec = ChildSpec(name="proxy", group="proxy", argv=("/no/such/program",), env={})

    async def never() -> str:
        return "a token"

    assert await finished(asyncio.create_task(Supervisor([spec], log).run(never, lambda: None))) == 1
    assert log.having("No such file")


async def test_a_start_times_out_with_a_message() -> None:
    """A start-up wait without a bound never reports what is missing."""
    log = Log()
    limits = SupervisorLimits(start_s=0.0, report_s=0.0)

    async def never() -> str:
        return "a token of the workers"

    assert await finished(asyncio.create_task(Supervisor([child(WAITS)], log, limits).run(never, lambda: None))) == 1
    assert log.having("not ready after 0 s: a token of the workers")


async def test_a_stop_during_the_start_is_a_clean_end() -> None:
    """Ctrl-C while the weights load must not look like a failure, nor wait for the start."""
    log = Log()

    async def never() -> str:
        return "a token"

    supervisor = Supervisor([child(WAITS)], log)
    task = asyncio.create_task(supervisor.run(never, lambda: log("READY")))
    await log.until("up")
    supervisor.stop()
    assert await finished(task) == 0


async def test_a_dead_child_is_restarted() -> None:
    """Guards against losing a role to a single crash."""
    log = Log()
    async with running(log, child(WAITS), limits=SupervisorLimits(restart_delay_s=0.0)):
        first = int((await log.until("up")).split()[-1])
        os.kill(first, signal.SIGKILL)
        second = int((await log.until("up", 2)).split()[-1])
        assert second != first
        assert log.having("decode-0 ended (killed by SIGKILL); restart in")


def crash_loop(marker: Path, name: str) -> ChildSpec:
    """A child that waits at its first start, and dies at once at each further one."""
    code = f"import os, sys; p = {str(marker)!r}\nif os.path.exists(p): sys.exit(7)\nopen(p, 'w').close()\n{WAITS}"
    return child(code, name)


async def test_restarts_are_bounded_and_the_last_of_a_group_ends_the_service(tmp_path: Path) -> None:
    """A worker that cannot start any more would be restarted for ever, behind a proxy that can only refuse."""
    log = Log()
    specs = [crash_loop(tmp_path / "m", "decode-0"), child(DRAINS, "proxy", "proxy")]
    async with running(log, *specs, limits=SupervisorLimits(restart_delay_s=0.0, max_restarts=2), count=2) as (_, task):
        os.kill(int(log.having("[decode-0] up")[0].split()[-1]), signal.SIGKILL)
        assert await finished(task) == 1
    assert len(log.having("restart in")) == 2
    assert log.having("decode-0 ended (exit status 7) after 2 restarts: given up")
    assert log.having("giving up: no decode process is left")
    assert log.having("[proxy] drained")


async def test_a_failed_child_leaves_its_twin_serving(tmp_path: Path) -> None:
    """One broken worker of two must not stop the service."""
    log = Log()
    specs = [crash_loop(tmp_path / "m", "decode-0"), child(WAITS, "decode-1")]
    async with running(log, *specs, limits=SupervisorLimits(restart_delay_s=0.0, max_restarts=0), count=2) as (
        sup,
        task,
    ):
        os.kill(int(log.having("[decode-0] up")[0].split()[-1]), signal.SIGKILL)
        await log.until("given up")
        assert not task.done()
        sup.stop()
        assert await finished(task) == 0


async def test_the_service_continues_without_an_optional_child(tmp_path: Path) -> None:
    """A store that cannot run would take a service down that works without it."""
    log = Log()
    store = replace(crash_loop(tmp_path / "m", "store"), group="store", needed=False)
    limits = SupervisorLimits(restart_delay_s=0.0, max_restarts=0)
    async with running(log, store, child(WAITS, "decode-1"), limits=limits, count=2) as (supervisor, task):
        os.kill(int(log.having("[store] up")[0].split()[-1]), signal.SIGKILL)
        await log.until("given up")
        for _ in range(10):
            await asyncio.sleep(0)  # so that a supervisor that minds can end
        assert not task.done() and not log.having("giving up")
        supervisor.stop()
        assert await finished(task) == 0


async def test_a_child_that_ignores_sigterm_is_killed_after_the_grace_time() -> None:
    """A hung worker would keep Ctrl-C waiting for ever."""
    log = Log()
    async with running(log, child(IGNORES), limits=SupervisorLimits(grace_s=0.0)) as (supervisor, task):
        supervisor.stop()
        assert await finished(task) == 0
    assert log.having("decode-0 killed")


async def test_a_second_stop_kills_at_once() -> None:
    """Guards the second Ctrl-C, which must end the drain at once."""
    log = Log()
    async with running(log, child(IGNORES), limits=SupervisorLimits(grace_s=86400.0)) as (supervisor, task):
        supervisor.stop()
        supervisor.stop()
        assert await finished(task) == 0
    assert log.having("decode-0 killed")


async def test_any_output_is_passed_on_completely() -> None:
    """A progress bar, a line without end, bytes that are no text, or a megabyte on one line must not stop the pump."""
    code = r"""
import sys
out = sys.stdout.buffer
out.write(b"10%\r20%\r\nbad \xff byte\n\n" + b"x" * 1000000 + b"\nunended"); out.flush()
"""
    log = Log()
    supervisor = Supervisor([child(code)], log)

    async def never() -> str:
        return "a token"

    await finished(asyncio.create_task(supervisor.run(never, lambda: None)))
    shown = [line.removeprefix("[decode-0] ") for line in log.lines if line.startswith("[decode-0] ")]
    assert shown[:3] == ["10%", "20%", r"bad \xff byte"]
    assert sum(line.count("x") for line in shown[3:-1]) == 1_000_000
    assert shown[-1] == "unended"


def holder(fifo: Path) -> str:
    """Code of a process that holds `fifo` open for writing until it dies."""
    return f"f = open({str(fifo)!r}, 'wb'); {WAITS}"


def open_reader(fifo: Path) -> int:
    os.mkfifo(fifo)
    return os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)


async def test_grandchildren_are_killed_with_their_child(tmp_path: Path) -> None:
    """A rank's process that outlives its worker keeps the GPU's memory."""
    reader = open_reader(tmp_path / "fifo")
    code = (
        "import subprocess, sys, signal\n"
        f"p = subprocess.Popen([sys.executable, '-c', {holder(tmp_path / 'fifo')!r}], stdout=subprocess.PIPE)\n"
        "p.stdout.readline(); print('up', flush=True); signal.pause()"
    )
    log = Log()
    async with running(log, child(code)) as (supervisor, task):
        with pytest.raises(BlockingIOError):  # held open: the grandchild runs
            os.read(reader, 1)
        supervisor.stop()
        assert await finished(task) == 0
    assert is_closed(reader)


def is_closed(reader: int) -> bool:
    """Whether all holders of the pipe are dead, within the time that the kernel takes to reap them."""
    ready, _, _ = select.select([reader], [], [], 30)
    return bool(ready) and os.read(reader, 1) == b""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG is Linux's")
def test_children_die_with_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    """`kill -9` of the supervisor must not leave workers that hold memory and ports."""
    reader = open_reader(tmp_path / "fifo")
    program = f"""
import asyncio, os, sys
from baton.launch.supervisor import ChildSpec, Supervisor
async def never():
    return "a token"
async def main():
    argv = (sys.executable, "-c", {holder(tmp_path / "fifo")!r})
    spec = ChildSpec(name="c", group="c", argv=argv, env=dict(os.environ))
    await Supervisor([spec], lambda line: print(line, flush=True)).run(never, lambda: None)
asyncio.run(main())
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as supervisor:
        assert supervisor.stdout is not None
        assert b"up" in supervisor.stdout.readline()
        with pytest.raises(BlockingIOError):
            os.read(reader, 1)
        supervisor.kill()
        assert is_closed(reader)


async def test_a_signal_reaches_one_group_once_all_serve() -> None:
    """Guards against SIGHUP that ends a process which is still starting, another group, or what a child has started."""
    log = Log()
    hears = (
        "import signal, subprocess, sys\n"
        "inner = subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'])\n"
        "signal.signal(signal.SIGHUP, lambda *_: print('inner', inner.poll(), flush=True))\n"
        "print('up', flush=True)\nwhile 1: signal.pause()"
    )
    specs = [child(hears, "proxy", "proxy"), child(WAITS)]
    assert not Supervisor(specs, log).send("proxy", signal.SIGHUP)
    async with running(log, *specs, count=2) as (supervisor, task):
        assert supervisor.send("proxy", signal.SIGHUP)
        assert await log.until("[proxy] inner") == "[proxy] inner None"
        assert not task.done()


async def test_a_child_is_added_and_retired_while_others_run() -> None:
    """Guards autoscaling: one that is retired drains and stays away, and its group lives on in the others."""
    log = Log()
    async with running(log, child(WAITS)) as (supervisor, _):
        supervisor.add(child(DRAINS, "decode-1"))
        await log.until("[decode-1] up")
        assert supervisor.names() == {"decode-0", "decode-1"}
        supervisor.retire("decode-1")
        await log.until("decode-1 ended (exit status 0)")
        supervisor.add(child(DRAINS, "decode-1"))
        await log.until("[decode-1] up", 2)
