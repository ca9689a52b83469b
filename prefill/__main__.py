"""python -m baton.prefill: one prefill worker."""

from __future__ import annotations

import sys

from baton.node.settings import parse
from baton.prefill.settings import PrefillSettings
from baton.prefill.worker import PrefillWorker
from baton.worker.main import serve
from baton.worker.startup import Worker


def main() -> int:
    settings = parse(PrefillSettings, sys.argv[1:], prog="baton prefill", description="A prefill worker of Baton.")

    def make(worker: Worker, sizes: PrefillSettings) -> PrefillWorker:
        return PrefillWorker(worker, sizes, store=worker.store, sums=worker.sums)

    return serve("prefill", settings, make)


if __name__ == "__main__":
    sys.exit(main())
