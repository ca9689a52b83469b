"""The check of a model folder before any node starts: what a worker would refuse after seconds is said at once.

The floors that read the folder check it, each in a process of its own, at the same time: the launcher needs none of
their libraries, and outlives a file that makes one of them crash.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from baton.node.errors import SettingsError

TIMEOUT_S = 120.0
"""A disk that is slower than this has minutes of its own once the nodes start."""


def check_folder(
    folder: Path, options: Iterable[tuple[str, ...]], environ: Mapping[str, str], chat_template: Path | None = None
) -> None:
    """Raises SettingsError with what is wrong. `options`: as `folder_options`; `chat_template`: not the folder's."""
    template = () if chat_template is None else (str(chat_template),)
    commands = [
        *(("baton.models.check", str(folder), *each) for each in sorted(options)),
        ("baton.proxy.text.check", str(folder), *template),
    ]
    checks = [
        subprocess.Popen(
            [sys.executable, "-P", "-m", *command],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    try:
        for check in checks:
            _, errors = check.communicate(timeout=TIMEOUT_S)
            if check.returncode:
                lines = errors.strip().splitlines() or [f"exit status {check.returncode}"]
                raise SettingsError(f"model folder {folder}: {lines[-1].removeprefix(f'{folder}: ')}")
    except subprocess.TimeoutExpired:
        return
    finally:
        for check in checks:
            check.kill()
            check.communicate()
