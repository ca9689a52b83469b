"""How a rank other than 0 ends: at once, whatever its threads and its GPU are doing.

An orderly end of a process with CUDA may wait for kernels, and kernels wait for words of other ranks. Rank 0 hands back
all that the worker has.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from baton.node.errors import PeerLost
from baton.node.telemetry import log_event
from baton.worker.ranks.links import RankLink
from baton.worker.ranks.members import first_lost

logger = logging.getLogger("rank")

GIVE_UP_S = 1.0
"""A driver that is busy may hold a call up."""


class RankEnding:
    """Of one rank's process. The first thread that ends it does so."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._begun = threading.Lock()
        self.give_up: Callable[[], None] = lambda: None
        """Ends waits of kernels for other ranks."""

    def end(self, reason: str, status: int) -> NoReturn:
        """Of the process."""
        self._begun.acquire()  # for good
        giving_up = threading.Thread(target=self.give_up, name="give-up", daemon=True)
        giving_up.start()
        log_event(logger, "rank_stopped", rank=self._rank, reason=reason)
        giving_up.join(GIVE_UP_S)
        os._exit(status)

    def follow(self, control: RankLink) -> None:
        """From now on a thread ends the process when rank 0 ends it, is gone, or is frozen; a rank that rank 0 has lost
        is one reason. Rank 0 sends beats once it serves."""
        threading.Thread(target=self._follow, args=(control,), name="follow", daemon=True).start()

    def _follow(self, control: RankLink) -> None:
        with suppress(PeerLost):  # which the next look finds too
            control.receive(None)
        self.end(first_lost((control,), threading.Event()), 0)
