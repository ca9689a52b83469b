"""Parameters that mean nothing to this server: refused, or accepted and named in the log and in a header of the answer.

It owns the names that were logged already, which are bounded. The values are neither read nor logged.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

from baton.node.errors import BadRequest
from baton.node.telemetry import log_event

logger = logging.getLogger(__name__)

HEADER = "x-baton-ignored-parameters"
MAX_LOGGED = 256
"""Names that are logged, once each; a client that invents names fills no log."""
MAX_SHOWN, MAX_SHOWN_CHARS = 32, 64
"""Names in the header, and their length."""
_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]")


class UnknownParameters:
    """What becomes of unknown parameters; `refuse`: the request is refused."""

    def __init__(self, *, refuse: bool) -> None:
        self._refuse = refuse
        self._logged: set[str] = set()

    def accept(self, names: Sequence[str]) -> dict[str, str]:
        """The headers that name them; raises BadRequest where they are refused."""
        if not names:
            return {}
        if self._refuse:
            message = f"Unrecognized request argument supplied: {names[0]}"
            raise BadRequest(message, param=names[0], code="unknown_parameter")
        # They are the client's: only letters that no header and no log line gives a meaning.
        shown = [_UNSAFE.sub("?", name[:MAX_SHOWN_CHARS]) for name in names[:MAX_SHOWN]]
        for name in shown:
            if name not in self._logged and len(self._logged) < MAX_LOGGED:
                self._logged.add(name)
                log_event(logger, "unknown_parameter_ignored", level=logging.WARNING, name=name)
        return {HEADER: ",".join(shown)}
