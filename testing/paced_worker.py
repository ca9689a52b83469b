"""python -m baton.testing.paced_worker ROLE SECONDS ...: a worker whose steps last at least SECONDS.

Tests that inject a fault into one phase of a request need that phase to last on a fast machine too. Otherwise it is
the same as `python -m baton.prefill` and `python -m baton.decode`.
"""

from __future__ import annotations

import sys
import time

from baton.decode.role import decode_role
from baton.decode.settings import DecodeSettings
from baton.node.settings import parse
from baton.prefill.role import PrefillRole
from baton.prefill.settings import PrefillSettings
from baton.worker.loop import Loop, WorkerRole
from baton.worker.main import serve
from baton.worker.parts import Parts
from baton.worker.settings import WorkerSettings


class PacedLoop(Loop):
    """A worker loop in which a turn with a step lasts at least `step_s`."""

    def __init__(self, parts: Parts, role: WorkerRole, settings: WorkerSettings, step_s: float) -> None:
        super().__init__(parts, role, max_waiting=settings.max_waiting, drain_s=settings.drain_s)
        self._step_s = step_s

    def turn(self, wait_s: float) -> bool:
        began_at = time.monotonic()
        worked = super().turn(wait_s)
        if worked:
            time.sleep(max(0.0, began_at + self._step_s - time.monotonic()))
        return worked


def main() -> int:
    role, seconds, *arguments = sys.argv[1:]
    step_s = float(seconds)
    if role == "prefill":
        prefill = parse(PrefillSettings, arguments, prog="paced prefill", description="For tests.")
        return serve(
            "prefill",
            prefill,
            lambda parts, device: PacedLoop(
                parts, PrefillRole(parts, prefill.sizes(device), prefill.policy), prefill, step_s
            ),
        )
    decode = parse(DecodeSettings, arguments, prog="paced decode", description="For tests.")
    return serve(
        "decode",
        decode,
        lambda parts, device: PacedLoop(parts, decode_role(parts, decode, device), decode, step_s),
    )


if __name__ == "__main__":
    sys.exit(main())
