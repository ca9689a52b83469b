"""python -m baton.benchmark serving | null-server: load tests of servers that speak OpenAI's API."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from uvicorn.loops.auto import auto_loop_factory

from baton.benchmark.load.null_server import NullServerSettings, serve
from baton.benchmark.load.serving import serving
from baton.benchmark.load.settings import ServingSettings
from baton.node.errors import SettingsError
from baton.node.settings import parse


def main(argv: Sequence[str]) -> int:
    command, rest = (argv[0], argv[1:]) if argv else ("", ())
    if command == "serving":
        settings = parse(ServingSettings, rest, "bench_serving", "Load tests a server that speaks OpenAI's API.")
        work = serving(settings, rest)
    elif command == "null-server":
        work = serve(parse(NullServerSettings, rest, "null-server", "Streams tokens that nobody computed."))
    else:
        print("usage: python -m baton.benchmark serving | null-server [--help]", file=sys.stderr)
        return 2
    try:
        with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:  # uvloop where it is installed
            return runner.run(work)
    except SettingsError as error:
        print(f"bench_serving: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("bench_serving: interrupted", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
