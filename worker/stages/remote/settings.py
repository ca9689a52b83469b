"""The settings of a stage on another host than the first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from baton.node.addresses import ADVERTISE_HELP
from baton.node.probe import PROBE_HELP
from baton.node.secret_file import INSECURE_HELP, SECRET_HELP, SECRET_VARIABLE
from baton.node.settings import option


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSettings:
    """The settings of `baton stage`. All others, of the model and of steps, come from the first stage."""

    model: str = option("demo", help="model, as the prefill worker has it: a Hugging Face folder, a hub id, or 'demo'")
    first: str = option(metavar="ADDRESS", help="address of the first stage: --stages-bind of the prefill worker")
    bind: str = option("tcp://127.0.0.1:0", help="address that decode workers connect to; port 0: a free one")
    advertise_host: str = option("", metavar="HOST", help=ADVERTISE_HELP)
    secret_file: Path | None = option(None, metavar="FILE", env=SECRET_VARIABLE, help=SECRET_HELP)
    insecure_network: bool = option(False, help=INSECURE_HELP)
    probe_port: int | None = option(None, help=PROBE_HELP, minimum=1, maximum=65535)
    threads: int | None = option(
        None, unit="threads", help="CPU threads of the model; default: torch's choice", minimum=1
    )
    join_s: float = option(600.0, unit="s", help="how long to try to join the first stage", minimum=1, maximum=86400)
    log_level: str = option("info", choices=("debug", "info", "warning", "error"), help="lowest level that is logged")
