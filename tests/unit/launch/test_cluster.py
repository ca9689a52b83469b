"""Guards launch.cluster with fake nodes: starts, ends, and the errors that a caller gets."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from baton.launch.cluster import Cluster, ClusterError
from baton.launch.local import ServeSettings
from baton.launch.supervisor import ChildSpec

# A node writes a file with its name while it runs; the proxy's metrics list the files.
PROXY = """
import glob, http.server, os, signal, sys
options = dict(zip(sys.argv[1:], sys.argv[2:])) | dict(word.split("=", 1) for word in sys.argv if "=" in word)
folder = FOLDER
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        key = os.environ.get("BATON_API_KEY")
        self.send_response(200 if not key or self.headers["Authorization"] == f"Bearer {key}" else 401)
        self.end_headers()
        for name in os.listdir(folder):
            try:
                os.kill(int(open(f"{folder}/{name}").read()), 0)
            except (OSError, ValueError):
                continue
            role = name.partition("-")[0]
            line = f'baton:worker_up{{role="{role}",state="ready",worker="{name}"}} 1.0\\n'
            self.wfile.write(line.encode())
    def log_message(self, *args):
        pass
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
http.server.HTTPServer(("127.0.0.1", int(options["--port"])), Handler).serve_forever()
"""
NODE = """
import os, signal, sys
print("arguments", *sys.argv[1:], flush=True)
if "--fail" in sys.argv:
    sys.exit("no such model")
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # waited for below; pause() would miss an early one
options = dict(zip(sys.argv[1:], sys.argv[2:])) | dict(word.split("=", 1) for word in sys.argv if "=" in word)
name = options.get("--worker-id", "store")
with open(FOLDER + "/." + name, "w") as file:
    file.write(str(os.getpid()))
os.replace(FOLDER + "/." + name, FOLDER + "/" + name)
signal.sigwait({signal.SIGTERM})
sys.exit(3 if "--bad-end" in sys.argv else 0)
"""


def stand_ins(folder: Path) -> Callable[[ChildSpec], ChildSpec]:
    folder.mkdir()

    def edit(spec: ChildSpec) -> ChildSpec:
        code = (PROXY if spec.name == "proxy" else NODE).replace("FOLDER", repr(str(folder)))
        return replace(spec, argv=(sys.executable, "-c", code, *spec.argv[4:]))

    return edit


def make(tmp_path: Path, **settings: object) -> Cluster:
    return Cluster(
        ServeSettings(device="cpu", start_timeout_s=60, **settings),  # type: ignore[arg-type]
        log_folder=tmp_path,
        edit=stand_ins(tmp_path / "up"),
    )


def test_all_nodes_run_and_end(tmp_path: Path) -> None:
    """A node that is not started, or outlives its cluster."""
    with make(tmp_path, prefill=2, api_key=("hunter2",)) as cluster:
        assert cluster.running() == ["proxy", "store", "prefill-0", "prefill-1", "decode-0"]
        assert cluster.members() == {"store", "prefill-0", "prefill-1", "decode-0"}, "the key opens /metrics"
        assert cluster.get("/metrics")[0] == 200
        pids = [cluster.pid(name) for name in cluster.names()]
    assert cluster.running() == []
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_node_is_killed_and_restarted_with_more_arguments(tmp_path: Path) -> None:
    """A restart that waits for the dead node's registration would be ready at once, without the node."""
    with make(tmp_path) as cluster:
        pid = cluster.pid("decode-0")
        cluster.kill("decode-0")
        assert "decode-0" not in cluster.running()
        cluster.restart("decode-0", "--num-blocks", "7")
        assert cluster.pid("decode-0") != pid and "decode-0" in cluster.members()
        assert cluster.log("decode-0").splitlines()[-1].endswith("--num-blocks 7")
        cluster.freeze("store")
        assert cluster.stop() == {}, "what is frozen ends too, and what was killed is no surprise"


def test_one_more_worker_joins_and_is_forgotten(tmp_path: Path) -> None:
    """A cluster that grows would count an ended guest as a failure."""
    with make(tmp_path) as cluster:
        cluster.add_worker("decode", "guest", "--num-blocks=5")
        cluster.wait_until(lambda: "guest" in cluster.members(), "the guest", 60)
        assert "hunter2" not in cluster.log("guest") and "--num-blocks=5" in cluster.log("guest")
        cluster.signal("guest", signal.SIGTERM)
        assert cluster.wait_end("guest", 60) == 0
        cluster.forget("guest")
        assert "guest" not in cluster.names()


def test_a_failed_start_gives_the_reason_and_leaves_nothing(tmp_path: Path) -> None:
    """The reason is in a log of a temporary folder, and the other nodes hold ports and memory."""
    cluster = make(tmp_path, decode_arg=("--fail",))
    with pytest.raises(ClusterError, match=r"decode-0 has ended(.|\n)*no such model"):
        cluster.start()
    assert cluster.running() == []


def test_a_node_that_exits_with_an_error_is_reported(tmp_path: Path) -> None:
    """A worker that holds a block at its end fails its check, and only its status says so."""
    with make(tmp_path, decode_arg=("--bad-end",)) as cluster:
        assert cluster.stop() == {"decode-0": 3}


def test_logs_are_removed_unless_a_folder_is_given(tmp_path: Path) -> None:
    """Temporary folders that pile up."""
    cluster = Cluster(ServeSettings(device="cpu", start_timeout_s=60), edit=stand_ins(tmp_path / "up"))
    with cluster:
        assert "--worker-id prefill-0" in cluster.log("prefill-0")
    with pytest.raises(FileNotFoundError):
        cluster.log("prefill-0")
