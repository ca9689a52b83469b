"""The settings of a host's KV store."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from baton.node.probe import PROBE_HELP
from baton.node.secret_file import INSECURE_HELP, SECRET_HELP, SECRET_VARIABLE
from baton.node.settings import option


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSettings:
    store_id: str = option("", help="name of this store in logs and metrics; default: store, its host and process id")
    proxy: tuple[str, ...] = option(
        (),
        metavar="ADDRESS",
        help="control address of a proxy that receives the KV events of this store; repeat it for several",
    )
    bind: str = option(
        "tcp://127.0.0.1:5571", metavar="ADDRESS", help="address that workers and other stores connect to"
    )
    secret_file: Path | None = option(None, metavar="FILE", env=SECRET_VARIABLE, help=SECRET_HELP)
    insecure_network: bool = option(False, help=INSECURE_HELP)
    probe_port: int | None = option(None, help=PROBE_HELP, minimum=1, maximum=65535)
    ram_gib: float = option(1.0, unit="GiB", help="size of the arena in RAM, never exceeded", minimum=0.0001)
    disk_gib: float = option(0.0, unit="GiB", help="size on disk, for each model that is served; 0: no disk", minimum=0)
    disk: str = option(
        "slab", choices=("slab", "lmdb"), help="how blocks are stored on disk: in slots of a file, or in LMDB"
    )
    path: Path = option(Path("kvstore"), metavar="FOLDER", help="folder of the blocks on disk")
    peer: tuple[str, ...] = option((), metavar="ADDRESS", help="another host's store; repeat it for several")
    log_level: str = option("info", choices=("debug", "info", "warning", "error"), help="lowest level that is logged")
