"""python -m decode: one decode worker."""

from __future__ import annotations

import sys

from decode.settings import DecodeSettings
from decode.worker import DecodeWorker
from node.settings import parse
from worker.main import serve


def main() -> int:
    settings = parse(DecodeSettings, sys.argv[1:], prog="python -m decode", description="A decode worker of Baton.")
    return serve("decode", settings, lambda worker, sizes: DecodeWorker(worker, sizes, store=worker.store))


if __name__ == "__main__":
    sys.exit(main())
