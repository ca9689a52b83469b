"""Which machine this is, and how many files it lets a node open.

Two processes with equal `host_identity` see the same processes and can map each other's memory.
"""

from __future__ import annotations

import os
import platform
import re
import resource
from pathlib import Path

NODE_FILES = 65_536
"""Most that a node may have open, beside the connections of a proxy's clients. A worker's peer takes about eight, and
sockets are files."""


def host_identity() -> str:
    """The kernel's boot id and the pid namespace: equal only for processes that can name each other by pid.

    Where there is no /proc it is the host's name. At most 96 characters.
    """
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return f"name-{platform.node()}"[:96]
    boot = boot_id()
    return f"{boot}-{namespace}" if boot else f"name-{platform.node()}"[:96]


def default_name(role: str) -> str:
    """The name of a node that was given none: process ids alone are equal in containers, where each may be 1."""
    host = re.sub(r"[^A-Za-z0-9._-]", "-", platform.node().partition(".")[0])[:40]
    return f"{role}-{host}-{os.getpid()}"


def boot_id() -> str:
    """Differs after every start of the kernel; "" where the kernel does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def allow_files(wanted: int) -> int:
    """Let this process have so many files open, or as many as the system permits; returns how many it may.

    Systems start processes with 1,024, of which a worker of more than a hundred peers has too few.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft == resource.RLIM_INFINITY or soft >= files:
        return files
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    return files
