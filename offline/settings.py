"""The settings of `baton batch`.

Apart from the command, which runs as `__main__`: the types of its fields could not be looked up there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from baton.node.settings import option


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSettings:
    """What `baton batch` can be given."""

    input: Path = option(metavar="FILE", help="requests, one a line, in OpenAI's batch format (-i)")
    output: Path = option(
        metavar="FILE", help="answers, one a line; requests that have an answer in it are skipped (-o)"
    )
    model: str = option("", metavar="FOLDER_OR_HUB_ID", help="model to serve; default: the demo model", positional=True)
    base_url: str = option("", metavar="URL", help="a running server to use instead, with the model of this name")
    api_key: str = option("", help="key of that server", env="BATON_API_KEY")
    serve_arg: tuple[str, ...] = option(
        (), metavar="ARGUMENT", help="option of the server that is started, as in --serve-arg=--decode=2"
    )
    max_in_flight: int | None = option(None, help="most requests at once; default: by the workers", minimum=1)
    request_timeout_s: float = option(3600.0, unit="s", help="time limit of one request", minimum=1, maximum=86400)
