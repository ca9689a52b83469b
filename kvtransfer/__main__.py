"""python -m baton.kvtransfer: the KV store of one host."""

from __future__ import annotations

import sys

from baton.kvtransfer.store.process import serve
from baton.kvtransfer.store.settings import StoreSettings
from baton.node.settings import parse


def main() -> int:
    settings = parse(StoreSettings, sys.argv[1:], prog="baton store", description="The KV store of a host.")
    return serve(settings)


if __name__ == "__main__":
    sys.exit(main())
