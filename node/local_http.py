"""HTTP between processes of one user on one machine: GET over a Unix socket in a folder that only this user can enter.

The file system says who may connect, so these sockets need no key and no TLS, whatever the network's side has. It does
not know what is asked for.
"""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path

from baton.node.errors import SettingsError

MAX_ANSWER_BYTES = 64 << 20


def proxy_socket(folder: Path, index: int) -> Path:
    """Where proxy number `index` of those that share a port is asked."""
    return folder / f"proxy-{index}.sock"


def require_private(folder: Path) -> None:
    """Raise SettingsError where others than this user could put sockets into `folder`, or connect to those in it."""
    try:
        found = folder.stat()
    except OSError as error:
        raise SettingsError(f"{folder}: {error.strerror}") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise SettingsError(f"{folder} must be a folder that this user owns and no other user can enter (mode 0700)")


async def get(socket: Path, path: str, timeout_s: float) -> tuple[int, bytes]:
    """Status and body of GET `path` at `socket`; status 0 where no whole answer came in time."""
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_unix_connection(str(socket))
            try:
                writer.write(f"GET {path} HTTP/1.1\r\nHost: proxy\r\nConnection: close\r\n\r\n".encode())
                head = await reader.readuntil(b"\r\n\r\n")
                length = _length(head)
                return int(head.split(maxsplit=2)[1]), await reader.readexactly(length)
            finally:
                writer.close()
    except (OSError, TimeoutError, ValueError, IndexError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        return 0, b""


def _length(head: bytes) -> int:
    """The declared length of the body; ValueError where there is none, or it is beyond the bound."""
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length" and 0 <= (length := int(value)) <= MAX_ANSWER_BYTES:
            return length
    raise ValueError("no length")
