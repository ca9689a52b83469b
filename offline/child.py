"""python -m baton.offline.child: `baton serve` for one parent process, which it does not outlive.

Its arguments come as one line of JSON on standard input: a command line is visible to all users of the machine, an API
key must not be. Standard input then stays open; its end makes this process stop.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import sys
import threading

from baton.launch.serve import main as serve

CHECK_S = 1.0


def main() -> int:
    parent_pid = os.getppid()
    start = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=stop_with_parent, args=(sys.stdin.fileno(), parent_pid), daemon=True).start()
    try:
        return serve([*start["argv"], f"--api-key={start['api_key']}"])
    finally:
        if os.getppid() != parent_pid:  # else the parent still reads the output in it
            shutil.rmtree(start["folder"], ignore_errors=True)


def stop_with_parent(pipe: int, parent_pid: int) -> None:
    """Waits until `pipe` closes or the parent is another process, then ends this process as SIGTERM does.

    The second condition counts where a fork of the parent still holds the pipe open.
    """
    while os.getppid() == parent_pid:
        readable, _, _ = select.select([pipe], [], [], CHECK_S)
        if readable and not os.read(pipe, 1):
            break
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
