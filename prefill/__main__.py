"""python -m prefill: one prefill worker."""

from __future__ import annotations

import sys

from node.settings import parse
from prefill.settings import PrefillSettings
from prefill.worker import PrefillWorker
from worker.main import serve
from worker.start import Worker


def main() -> int:
    settings = parse(PrefillSettings, sys.argv[1:], prog="python -m prefill", description="A prefill worker of Baton.")

    def make(worker: Worker, sizes: PrefillSettings) -> PrefillWorker:
        return PrefillWorker(worker, sizes, store=worker.store, sums=worker.sums)

    return serve("prefill", settings, make)


if __name__ == "__main__":
    sys.exit(main())
