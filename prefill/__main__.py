"""python -m baton.prefill: one prefill worker."""

from __future__ import annotations

import sys

from baton.node.settings import parse
from baton.prefill.role import prefill_loop
from baton.prefill.settings import PrefillSettings
from baton.worker.main import serve


def main() -> int:
    settings = parse(PrefillSettings, sys.argv[1:], prog="baton prefill", description="A prefill worker of Baton.")
    return serve("prefill", settings, lambda parts, device: prefill_loop(parts, settings, device))


if __name__ == "__main__":
    sys.exit(main())
