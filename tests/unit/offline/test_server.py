"""The private server's arguments: the settings of `serve`, and no secret among them."""

from __future__ import annotations

from pathlib import Path

from baton.launch.local import ServeSettings
from baton.node.settings import parse
from baton.offline.server import as_arguments


def test_arguments_give_the_settings_back() -> None:
    """A value that is lost on the way starts another server than the program asked for."""
    given = {
        "prefill": 2,
        "device": "cpu",
        "gpus": [0, 1],
        "local_prefill": "never",
        "store_ram_gib": 0.5,
        "store_path": Path("a folder"),
        "worker_arg": ("--max-num-seqs=8", "--dtype=float32"),
        "proxy_arg": "--log-level=debug",
        "insecure_network": False,
        "served_model_name": None,
    }
    settings = parse(ServeSettings, as_arguments(given), prog="serve", description="")
    assert settings == ServeSettings(
        prefill=2,
        device="cpu",
        gpus=(0, 1),
        local_prefill="never",
        store_ram_gib=0.5,
        store_path=Path("a folder"),
        worker_arg=("--max-num-seqs=8", "--dtype=float32"),
        proxy_arg=("--log-level=debug",),
    )
