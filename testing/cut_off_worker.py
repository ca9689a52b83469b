"""python -m baton.testing.cut_off_worker FILE ...: a prefill worker that no decode worker hears while FILE exists.

What it sends to decode workers is held back until FILE is gone, as on a link that stands still in one direction; it
hears them, and its link to the proxy works. Otherwise it is the same as `python -m baton.prefill`.
"""

from __future__ import annotations

import sys
from collections import deque
from pathlib import Path
from typing import ClassVar

from baton.node.endpoint import Endpoint
from baton.node.messages.base import Message
from baton.node.settings import parse
from baton.prefill.role import prefill_loop
from baton.prefill.settings import PrefillSettings
from baton.worker import startup
from baton.worker.main import serve


class CutOffEndpoint(Endpoint):
    """Holds back messages to peers while `file` exists."""

    file = Path()
    _held: ClassVar[deque[tuple[str, Message]]] = deque()

    def send(self, peer: str, message: Message) -> bool:
        if peer.startswith("proxy@"):
            return super().send(peer, message)
        self._held.append((peer, message))
        while self._held and not self.file.exists():
            super().send(*self._held.popleft())
        return True


def main() -> int:
    file, *arguments = sys.argv[1:]
    CutOffEndpoint.file = Path(file)
    startup.Endpoint = CutOffEndpoint  # type: ignore[misc, attr-defined]
    settings = parse(PrefillSettings, arguments, prog="cut-off prefill", description="For tests.")
    return serve("prefill", settings, lambda parts, device: prefill_loop(parts, settings, device))


if __name__ == "__main__":
    sys.exit(main())
