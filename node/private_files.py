"""Files that only their owner may read and write, whatever the process's umask is: state, logs, KV."""

from __future__ import annotations

import os


def private_opener(path: str, flags: int) -> int:
    """For `open(..., opener=private_opener)`; an existing file keeps its mode."""
    return os.open(path, flags | os.O_CLOEXEC, 0o600)
