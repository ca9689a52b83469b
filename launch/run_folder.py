"""The private folder of one run on this machine: the secret of its links, and sockets of its processes."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self

from baton.node.secret_file import write_secret


class RunFolder:
    """A folder of mode 0700, with a short path as sockets need, and a new secret in it. `close` removes it."""

    def __init__(self) -> None:
        self._temporary = TemporaryDirectory(prefix="baton-")
        self.path = Path(self._temporary.name)
        self.secret_file = self.path / "secret"
        write_secret(self.secret_file)
        self._lock = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_EX)  # systemd-tmpfiles(8) leaves locked folders alone, however old they are

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """May be repeated."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
            self._temporary.cleanup()
