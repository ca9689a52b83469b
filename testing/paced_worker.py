"""python -m baton.testing.paced_worker ROLE SECONDS ...: a worker whose every step lasts at least so long.

The tests that disturb a request in one of its phases need that phase to last on a fast machine too. Nothing else
differs from `python -m baton.prefill` and `python -m baton.decode`.
"""

from __future__ import annotations

import sys
import time

from baton.decode.settings import DecodeSettings
from baton.decode.worker import DecodeWorker
from baton.node.settings import parse
from baton.prefill.settings import PrefillSettings
from baton.prefill.worker import PrefillWorker
from baton.worker.main import serve


def _rest_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))


class PacedPrefill(PrefillWorker):
    step_s = 0.0

    def turn(self, wait_s: float) -> bool:
        began = time.monotonic()
        worked = super().turn(wait_s)
        if worked:
            _rest_until(began + self.step_s)
        return worked


class PacedDecode(DecodeWorker):
    step_s = 0.0

    def turn(self, wait_s: float) -> bool:
        began = time.monotonic()
        worked = super().turn(wait_s)
        if worked:
            _rest_until(began + self.step_s)
        return worked


def main() -> int:
    role, step_s, *arguments = sys.argv[1:]
    if role == "prefill":
        PacedPrefill.step_s = float(step_s)
        prefill = parse(PrefillSettings, arguments, prog="paced prefill", description="For tests.")
        return serve("prefill", prefill, lambda worker, sizes: PacedPrefill(worker, sizes, store=worker.store))
    PacedDecode.step_s = float(step_s)
    decode = parse(DecodeSettings, arguments, prog="paced decode", description="For tests.")
    return serve("decode", decode, lambda worker, sizes: PacedDecode(worker, sizes, store=worker.store))


if __name__ == "__main__":
    sys.exit(main())
