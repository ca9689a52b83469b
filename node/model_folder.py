"""Reads files of a model folder, which may come from anywhere: regular files of a bounded size, JSON objects in them.

It knows no key and no format but JSON. Every fault is a SettingsError that names the file; a missing file is an
OSError of `stat`, since some files are optional.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from baton.node.errors import SettingsError
from baton.node.telemetry import excerpt

MAX_CONFIG_BYTES = 4 << 20
"""Of config.json and generation_config.json, which have a few kB; lists in them take 30 times their text in memory."""
MAX_TOKENS_BYTES = 16 << 20
"""Of a file that lists added tokens; the largest have about 1 MB."""
MAX_TOKENIZER_BYTES = 256 << 20
"""Of tokenizer.json; the largest have about 35 MB."""
MAX_VOCAB_SIZE = 1 << 22
"""Rows of the table of tokens; the largest have about 2^18."""
MAX_END_TOKENS = 63
"""A message about a request has room for these, the tokenizer's own and those of the request (`stop_token_ids`)."""


def checked_size(path: Path, max_bytes: int) -> int:
    """The size of a regular file, or a link to one, of at most `max_bytes`. Reading a pipe or a device may not end."""
    try:
        found = path.stat()
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path}: cannot be read: {error}") from None
    if not stat.S_ISREG(found.st_mode):
        raise SettingsError(f"{path}: is not a regular file")
    if found.st_size > max_bytes:
        raise SettingsError(f"{path}: has {found.st_size} bytes, more than {max_bytes}")
    return found.st_size


def read_file(path: Path, max_bytes: int) -> bytes:
    """The bytes of a regular file. Raises SettingsError; FileNotFoundError if there is none."""
    checked_size(path, max_bytes)
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from None


def read_object(path: Path, max_bytes: int) -> dict[str, Any]:
    """The JSON object in a file. Raises SettingsError; FileNotFoundError if there is no file."""
    try:
        value = json.loads(read_file(path, max_bytes))
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{path}: not valid JSON: {excerpt(error)}") from None
    if not isinstance(value, dict):
        raise SettingsError(f"{path}: must hold a JSON object")
    return value
