"""What an actor does on its machine: it runs one node of Baton as a child that outlives it. Knows nothing of Ray.

The child gets a private folder with the secret and its log. Before it starts, one that an earlier actor has left in
this folder is ended: it drains, and then its GPU, its memory and its ports are free. Proxies let an earlier child on
another machine drain when the new one registers.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from baton.launch.ray.plan import NodePlan
from baton.launch.supervisor import ChildSpec, Supervisor, SupervisorLimits, signal_group
from baton.node.local_http import require_private
from baton.node.private_files import private_opener

POLL_S = 0.1
MAX_MESSAGES = 20


@dataclass(frozen=True, slots=True)
class HostReport:
    """What an actor says of its child."""

    pid: int
    """0: none runs now."""
    host: str
    log: str
    messages: tuple[str, ...]
    """The last ones of the supervisor."""


class NodeHost:
    """Runs one node until `stop`; `on_given_up` is called where it ends again and again.

    `secret`: that of the links, written for the child; empty: `secret_file` is one that is there.
    """

    def __init__(
        self,
        plan: NodePlan,
        deployment: str,
        host: str,
        secret: str,
        secret_file: str,
        grace_s: float,
        on_given_up: Callable[[], None],
    ) -> None:
        self._plan = plan
        self._host = host
        self._grace_s = grace_s
        self._on_given_up = on_given_up
        self._folder = private_folder(deployment, plan.name)
        self._log = self._folder / "log"
        if secret:
            path = self._folder / "secret"
            path.unlink(missing_ok=True)
            with open(path, "w", encoding="ascii", opener=private_opener) as file:
                file.write(secret)
            secret_file = str(path)
        self._command = plan.command(host, secret_file)
        self._messages: deque[str] = deque(maxlen=MAX_MESSAGES)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._supervisor: Supervisor | None = None
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)
        self._stopped = threading.Event()

    def start(self) -> None:
        self._thread.start()

    def report(self) -> HostReport:
        pids = self._supervisor.pids() if self._supervisor is not None else {}
        return HostReport(pids.get(self._plan.name, 0), self._host, str(self._log), tuple(self._messages))

    def stop(self) -> None:
        """Drain the child, and return when it has ended."""
        self._stopped.set()
        loop, supervisor = self._loop, self._supervisor
        if loop is not None and supervisor is not None and self._thread.is_alive():
            loop.call_soon_threadsafe(supervisor.stop)
        self._thread.join(2 * self._grace_s + 10.0)
        if self._thread.is_alive():
            return
        shutil.rmtree(self._folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # other nodes of the deployment are on this machine
            self._folder.parent.rmdir()

    def _run(self) -> None:
        try:
            end_predecessor(self._log, self._grace_s, self._stopped)
            asyncio.run(self._supervise())
        finally:
            if not self._stopped.is_set():
                self._on_given_up()

    async def _supervise(self) -> None:
        child = ChildSpec(
            name=self._plan.name,
            group=self._plan.role,
            argv=self._command,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **self._plan.env},
            outlives=self._log,
        )
        self._supervisor = Supervisor([child], self._messages.append, SupervisorLimits(grace_s=self._grace_s))
        self._loop = asyncio.get_running_loop()
        if not self._stopped.is_set():
            await self._supervisor.run(_is_ready, lambda: None)


async def _is_ready() -> str:
    """A child that ends during its start is started again too: what it lacks may come."""
    return ""


def private_folder(deployment: str, name: str) -> Path:
    """The node's folder on this machine, of mode 0700, whichever actor asks."""
    root = Path(tempfile.gettempdir()) / f"baton-ray-{os.geteuid()}"
    for folder in (root, root / deployment, root / deployment / name):
        folder.mkdir(mode=0o700, exist_ok=True)
        require_private(folder)
    return root / deployment / name


def end_predecessor(log: Path, grace_s: float, stopped: threading.Event) -> None:
    """End processes that write to this log and lead a process group: SIGTERM, and SIGKILL when the time is up."""
    for pid in writers_of(log):
        signal_group(pid, signal.SIGTERM)
    until = time.monotonic() + grace_s
    while (left := writers_of(log)) and time.monotonic() < until and not stopped.wait(POLL_S):
        pass
    for pid in left:
        signal_group(pid, signal.SIGKILL)


def writers_of(log: Path) -> list[int]:
    """Leaders of process groups whose standard output is this file."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if (
                entry.name.isdigit()
                and os.readlink(entry / "fd/1") == str(log)
                and os.getpgid(int(entry.name)) == int(entry.name)
            ):
                found.append(int(entry.name))
        except OSError:  # it has ended, or is another user's
            continue
    return found
