"""Whether a file that is in use is still the one at its path, and as large as it was made.

Files of a cache may be removed, replaced or cut short by others while a tier has them open. What is read through a
mapping past the new end of a file ends the process (SIGBUS, see mmap(2)), and what is written to a removed file is lost
at the next start; so the file is looked at before each use. It takes two microseconds.
"""

from __future__ import annotations

import os
from pathlib import Path

from baton.kvtransfer.store.disk.base import Miss
from baton.kvtransfer.store.disk.records import StorageBroken


class FileWatch:
    """Remembers the file at `path` as it is now. To be closed."""

    def __init__(self, path: Path) -> None:
        """Raises OSError if there is none."""
        self._path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        status = os.fstat(self._fd)
        self._file = (status.st_dev, status.st_ino)
        self._size_bytes = status.st_size

    def check(self) -> None:
        """Raises StorageBroken if there is another file now, or it is shorter than it was."""
        try:
            status = os.stat(self._path)
        except OSError as error:
            raise StorageBroken(Miss.IO_ERROR, str(error)) from error
        if (status.st_dev, status.st_ino) != self._file:
            raise StorageBroken(Miss.IO_ERROR, f"another file lies at {self._path}")
        if status.st_size < self._size_bytes:
            cause = f"{self._path} has {status.st_size} bytes instead of {self._size_bytes}"
            raise StorageBroken(Miss.TRUNCATED, cause)

    def restore_size(self) -> None:
        """If the file was cut short, let it end with zeros where it ended, so that all of a mapping can be touched.

        Raises OSError.
        """
        if os.fstat(self._fd).st_size < self._size_bytes:
            os.ftruncate(self._fd, self._size_bytes)

    def close(self) -> None:
        os.close(self._fd)
