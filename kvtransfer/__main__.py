"""python -m kvtransfer: the KV store of one host."""

from __future__ import annotations

import sys

from kvtransfer.store.process import serve
from kvtransfer.store.settings import StoreSettings
from node.settings import parse


def main() -> int:
    settings = parse(StoreSettings, sys.argv[1:], prog="python -m kvtransfer", description="The KV store of a host.")
    return serve(settings)


if __name__ == "__main__":
    sys.exit(main())
