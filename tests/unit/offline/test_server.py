"""The private server's settings: as arguments of `serve`, and what they say of its size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from baton.launch.local import ServeSettings
from baton.node.settings import as_arguments, parse
from baton.offline.connection import ROWS_PER_WORKER, num_rows


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
    settings = parse(ServeSettings, as_arguments(ServeSettings, given), prog="serve", description="")
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


def test_as_many_requests_as_the_workers_have_rows() -> None:
    """Fewer in flight would leave rows empty whatever the GPU."""
    assert num_rows({}) == ROWS_PER_WORKER
    assert num_rows({"max_num_seqs": 8, "decode": 2}) == 16
    assert num_rows({"decode": 2, "worker_arg": ["--max-num-seqs=64", "--dtype=float32"]}) == 128
    assert num_rows({"worker_arg": "--max-num-seqs=64", "decode_arg": ("--max-num-seqs=512",)}) == 512


def test_a_key_may_begin_with_a_dash(tmp_path: Path) -> None:
    """Guards one start in 64: keys are random, and this one was taken for an option."""
    start = {"argv": [f"--model={tmp_path / 'none'}"], "api_key": "-key", "folder": str(tmp_path / "run")}
    command = [sys.executable, "-P", "-m", "baton.offline.child"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdin is not None and child.stderr is not None
        child.stdin.write(json.dumps(start).encode() + b"\n")
        child.stdin.flush()  # its end would stop the child
        said = child.stderr.read()
    assert str(tmp_path / "none") in said.decode() and "--api-key" not in said.decode()
