"""python -m baton.decode: one decode worker."""

from __future__ import annotations

import sys

from baton.decode.role import decode_loop
from baton.decode.settings import DecodeSettings
from baton.node.settings import parse
from baton.worker.main import serve


def main() -> int:
    settings = parse(DecodeSettings, sys.argv[1:], prog="baton decode", description="A decode worker of Baton.")
    return serve(settings.role, settings, lambda parts, device: decode_loop(parts, settings, device))


if __name__ == "__main__":
    sys.exit(main())
