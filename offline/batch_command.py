"""`baton batch`: answers a file of requests, with a running server or one that it starts.

Owns the command line, the progress bar, the summary and the exit status: 0 where every line is answered, 1 where one
has failed or is left, 2 where the command is wrong. Lines and files are `offline.batch`'s.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from baton.launch.local import ServeSettings
from baton.node.errors import SettingsError
from baton.node.modelhub import DEMO_MODEL
from baton.node.settings import parse
from baton.offline.batch import (
    BatchCounts,
    BatchOutput,
    BatchRequest,
    ServerGone,
    answer_line,
    read_requests,
    unanswered,
)
from baton.offline.client import run_bounded
from baton.offline.connection import ServerConnection
from baton.offline.settings import BatchSettings

SHORT_OPTIONS = {"-i": "--input", "-o": "--output"}


def main(argv: Sequence[str]) -> int:
    """The exit status."""
    settings = parse(
        BatchSettings,
        _long_options(argv),
        prog="baton batch",
        description="Answer a file of requests, or the rest of it.",
    )
    counts = BatchCounts()
    try:
        status = _answer_file(settings, counts)
    except (SettingsError, TypeError) as error:
        print(f"baton batch: error: {error}", file=sys.stderr)
        return 2
    except ServerGone as error:
        print(f"baton batch: stopped: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        status = 130
    print(f"baton batch: {counts.summary()}{'' if status in (0, 1) else ', interrupted'}", flush=True)
    return status


def _long_options(argv: Sequence[str]) -> list[str]:
    """`argv` with -i and -o spelt out."""
    return [SHORT_OPTIONS.get(argument, argument) for argument in argv]


def _answer_file(settings: BatchSettings, counts: BatchCounts) -> int:
    if not settings.input.is_file():
        raise SettingsError(f"cannot read {settings.input}: no such file")
    if settings.output.exists() and settings.output.samefile(settings.input):
        raise SettingsError("input and output are the same file")
    if settings.base_url and settings.serve_arg:
        raise SettingsError("--serve-arg is for a server that is started; --base-url names one that runs")
    with BatchOutput(settings.output) as output:
        left = unanswered(read_requests(settings.input), output.done, counts)
        first = next(left, None)
        if first is None:  # nothing to start a server for
            return 0
        server = _connect(settings)
        try:
            _answer_all(server, chain([first], left), output, counts, _count_lines(settings.input))
        finally:
            server.close()
    return 1 if counts.failed else 0


def _connect(settings: BatchSettings) -> ServerConnection:
    """The running server, or one of our own."""
    serve = {}
    if not settings.base_url:
        given = parse(ServeSettings, settings.serve_arg, prog="baton batch: --serve-arg", description="", environ={})
        serve = {field.name: getattr(given, field.name) for field in fields(given)}
        serve = {name: value for name, value in serve.items() if value != getattr(ServeSettings(), name)}
    return ServerConnection(
        settings.model if settings.base_url else settings.model or DEMO_MODEL,
        base_url=settings.base_url,
        api_key=settings.api_key if settings.base_url else "",
        max_in_flight=settings.max_in_flight,
        request_timeout_s=settings.request_timeout_s,
        settings=serve,
    )


def _answer_all(
    server: ServerConnection, requests: Iterable[BatchRequest], output: BatchOutput, counts: BatchCounts, total: int
) -> None:
    with tqdm(total=total, desc="Answered", unit=" lines", dynamic_ncols=True) as bar:

        async def answer(request: BatchRequest) -> None:
            line = await answer_line(server.client, request, server.model)
            output.append(line)
            if line.response is not None and line.response.status_code == 200:
                counts.answered += 1
            else:
                counts.failed += 1
            bar.update(counts.answered + counts.failed + counts.skipped - bar.n)

        server.run(run_bounded(requests, server.max_in_flight, answer))


def _count_lines(path: Path) -> int:
    with path.open("rb") as lines:
        return sum(1 for line in lines if line.strip())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
