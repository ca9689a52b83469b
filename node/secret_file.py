"""The file with the secret of a cluster: its options, how it is made, and how it is read. It opens no socket."""

from __future__ import annotations

import os
import re
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path

from baton.node.errors import SettingsError
from baton.node.settings import option

SECRET_BYTES = 32
SECRET_VARIABLE = "BATON_SECRET_FILE"
SECRET_HELP = (
    "file with the secret that all nodes of a cluster share, as `baton secret FILE` makes it; links are encrypted, and "
    "only nodes that have it are let in"
)
INSECURE_HELP = (
    "run links in the clear where there is no --secret-file: any process that reaches this node's port reads prompts, "
    "joins as a worker and changes KV"
)
_HEX = re.compile(rf"[0-9A-Fa-f]{{{2 * SECRET_BYTES}}}".encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class SecretSettings:
    """Of `baton secret`."""

    file: Path = option(
        Path("cluster.secret"), metavar="FILE", help="the file to make, which must not exist", positional=True
    )


def read_secret(path: Path) -> bytes:
    """The secret in a file of 64 hex digits. Raises SettingsError for a file that others can read, or of other form."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # opening a pipe does not wait
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise SettingsError(f"--secret-file {path}: not a file")
            _check_private(path, found)
            text = file.read(4096).strip()
    except OSError as error:
        raise SettingsError(f"--secret-file {path}: cannot be read: {error.strerror}") from None
    if not _HEX.fullmatch(text):
        raise SettingsError(
            f"--secret-file {path}: not {2 * SECRET_BYTES} hex digits; make one with `baton secret FILE`, or with "
            f"`openssl rand -hex {SECRET_BYTES}`"
        )
    return bytes.fromhex(text.decode())


def write_secret(path: Path) -> None:
    """Make a file with a new secret, which only this user can read. Raises SettingsError if it exists already."""
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
            file.write(secrets.token_hex(SECRET_BYTES) + "\n")
    except OSError as error:
        raise SettingsError(f"{path}: cannot be made: {error.strerror}") from None


def _check_private(path: Path, found: os.stat_result) -> None:
    """A group may read what root owns: secrets of Kubernetes are mounted so for users other than root."""
    shared = 0o037 if found.st_uid == 0 and os.geteuid() != 0 else 0o077
    if found.st_uid not in (0, os.geteuid()) or found.st_mode & shared:
        raise SettingsError(
            f"--secret-file {path}: other users can read or change it (mode {stat.S_IMODE(found.st_mode):04o}, owner "
            f"{found.st_uid}): `chmod 600 {path}`, and make it again, since they may have read it"
        )
