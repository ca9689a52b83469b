"""Room for a whole file on disk, or none of it."""

from __future__ import annotations

import os


def allocate(fd: int, size_bytes: int) -> None:
    """Give the file blocks of the disk up to `size_bytes`. Raises OSError where there is no room for all of them; the
    file then has the size that it had: file systems may keep what they found before the disk was full."""
    before_bytes = os.fstat(fd).st_size
    try:
        os.posix_fallocate(fd, 0, size_bytes)
    except OSError:
        os.ftruncate(fd, before_bytes)
        raise
