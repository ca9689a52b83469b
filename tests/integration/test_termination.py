"""SIGTERM at awkward moments: twice, during the start, to all nodes, without a proxy. No node hangs or fails."""

from __future__ import annotations

import signal
from pathlib import Path

from baton.tests.integration.cluster import Cluster
from baton.tests.integration.test_failures import begin, demand_undisturbed, mixed, new_prompt, wait_chunks

WORKERS = ("prefill-0", "decode-0")


def test_sigterm_at_awkward_moments(tmp_path: Path) -> None:
    """Guards the end of each node: a second signal cuts no stream off, one during the start is not lost, and a worker
    whose proxy is gone waits for none of its requests until the end of its drain time."""
    with Cluster(decode_step_s=0.02, worker_args=("--drain-s", "25"), store_args=(), log_folder=tmp_path) as cluster:
        requests = mixed(2)
        streams = begin(cluster, requests)
        wait_chunks(cluster, streams, 3)
        for name in ("decode-0", "decode-0", "prefill-0", "prefill-0", "store", "store"):
            cluster.nodes.signal(name, signal.SIGTERM)
        assert [cluster.wait_end(name) for name in (*WORKERS, "store")] == [0, 0, 0]
        assert [stream.join().finish for stream in streams] == ["length", "length"]
        for name in (*WORKERS, "store"):
            cluster.nodes.start_node(name)
            cluster.nodes.signal(name, signal.SIGTERM)
            assert cluster.wait_end(name) in (0, -signal.SIGTERM)
        cluster.nodes.revive()
        demand_undisturbed(cluster, requests, streams)

        orphans = [cluster.begin(new_prompt(), max_tokens=1500, ignore_eos=True) for _ in range(2)]
        wait_chunks(cluster, orphans, 3)
        cluster.nodes.kill("proxy")
        for name in WORKERS:
            cluster.nodes.signal(name, signal.SIGTERM)
        assert [cluster.wait_end(name) for name in WORKERS] == [0, 0]
        for name in (*WORKERS, "store", "proxy"):
            assert "Traceback" not in cluster.nodes.log(name)
