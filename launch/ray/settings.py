"""The settings of `baton ray`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from baton.node.api_settings import ApiSettings
from baton.node.engine_settings import EngineSettings
from baton.node.errors import SettingsError
from baton.node.modelhub import DEMO_MODEL
from baton.node.settings import option


@dataclass(frozen=True, slots=True, kw_only=True)
class RaySettings(ApiSettings, EngineSettings):
    """Those of ApiSettings are the proxy's, those of EngineSettings each worker's."""

    model: str = option(
        DEMO_MODEL,
        metavar="MODEL",
        help="the demo model, a folder that every machine has, or a hub id org/name",
        positional=True,
    )
    prefill: int = option(1, help="number of prefill workers; 0: decode workers prefill too", minimum=0, maximum=1024)
    decode: int = option(1, help="number of decode workers", minimum=1, maximum=1024)
    max_prefill: int = option(
        0,
        help="have up to so many prefill workers, and --prefill at least, as the objectives ask for (--proxy-arg="
        "--slo-ttft-ms=...); 0: --prefill",
        minimum=0,
        maximum=1024,
    )
    max_decode: int = option(
        0,
        help="have up to so many decode workers, and --decode at least, as the objectives ask for (--proxy-arg="
        "--slo-tpot-ms=...); 0: --decode",
        minimum=0,
        maximum=1024,
    )
    address: str = option("auto", help="the Ray cluster, as in ray.init(); auto: the one that runs on this machine")
    name: str = option("baton", help="name of this deployment, of which a Ray cluster may have several")
    down: bool = option(
        False, help="end the deployment of this --name that an earlier command has left, and nothing else"
    )
    device: str = option(
        "auto",
        choices=("auto", "cpu", "cuda"),
        help="where the model runs; auto: on GPUs if the Ray cluster has any",
    )
    worker_cpus: float = option(1.0, unit="CPUs", help="of Ray, for each worker", minimum=0)
    proxy_cpus: float = option(1.0, unit="CPUs", help="of Ray, for the proxy", minimum=0)
    spread: str = option(
        "SPREAD",
        choices=("SPREAD", "PACK", "STRICT_SPREAD", "STRICT_PACK"),
        help="how Ray places the workers of each role on machines",
    )
    port: int = option(8000, help="port of the HTTP API, on this machine", minimum=1, maximum=65535)
    control_port: int = option(
        5570, help="port of the proxy that workers connect to, on this machine", minimum=1, maximum=65535
    )
    secret_file: Path | None = option(
        None,
        metavar="FILE",
        help="secret of the links, a file that every machine has; default: a new one, which Ray brings to the machines",
    )
    proxy_arg: tuple[str, ...] = option((), metavar="ARGUMENT", help="argument for the proxy, as with `baton serve`")
    worker_arg: tuple[str, ...] = option((), metavar="ARGUMENT", help="argument for each worker")
    prefill_arg: tuple[str, ...] = option((), metavar="ARGUMENT", help="argument for each prefill worker")
    decode_arg: tuple[str, ...] = option((), metavar="ARGUMENT", help="argument for each decode worker")
    orphan_s: float = option(
        600.0,
        unit="s",
        help="time that a node serves on when its actor is gone and no other takes its place",
        minimum=0,
        maximum=1e6,
    )
    start_timeout_s: float = option(600.0, unit="s", help="time limit for the start, up to the first token", minimum=1)
    grace_s: float = option(45.0, unit="s", help="time for processes to drain before they are killed", minimum=0)

    def __post_init__(self) -> None:
        ApiSettings.__post_init__(self)  # super() does not work in a class with slots
        if self.proxies > 1:
            raise SettingsError(f"--proxies {self.proxies}: on Ray there is one proxy")
