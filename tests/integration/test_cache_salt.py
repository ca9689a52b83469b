"""`cache_salt` with real processes: prompts of different salts share no KV, whichever pool, tier or attempt had it."""

from __future__ import annotations

from pathlib import Path

import pytest

from baton.tests.integration.cluster import Cluster
from baton.tests.integration.prompts import LONG

PROMPT = LONG[3]


def _cached(cluster: Cluster, salt: str | None) -> int:
    """Cached prompt tokens of a request with this salt; answers do not depend on it."""
    body = {} if salt is None else {"cache_salt": salt}
    usage = cluster.complete(PROMPT, max_tokens=40, ignore_eos=True, **body)["usage"]
    return int(usage["prompt_tokens_details"]["cached_tokens"])


@pytest.mark.parametrize("local_prefill", ["never", "always"])
def test_only_requests_of_one_salt_share_kv(local_prefill: str, tmp_path: Path) -> None:
    """Guards a pool, and the store after the pools are gone: its blocks are those of the salt, answers included."""
    with Cluster(
        proxy_args=("--local-prefill", local_prefill),
        store_args=("--ram-gib", "0.1"),
        worker_args=("--store-loads", "always"),
        log_folder=tmp_path,
    ) as cluster:
        cluster.wait_until(lambda: list(cluster.worker_values("store_attached").values()) == [1.0] * 2, "a store")
        for salt in ("a", None, "b"):
            assert _cached(cluster, salt) == 0, salt
        whole = {salt: _cached(cluster, salt) for salt in ("a", None, "b")}
        assert min(whole.values()) > 64 and len(set(whole.values())) == 1, whole

        def written() -> float:
            return sum(cluster.worker_values("store_written_blocks_total").values())

        cluster.wait_until(lambda: cluster.store_value("ram_blocks") == written() > 0, "what the store holds")
        cluster.wait_idle()
        for name in ("prefill-0", "decode-0"):
            cluster.nodes.kill(name)
        cluster.nodes.revive()
        cluster.wait_until(lambda: list(cluster.worker_values("store_attached").values()) == [1.0] * 2, "a store")
        assert _cached(cluster, "c") == 0
        assert {salt: _cached(cluster, salt) for salt in ("a", None, "b")} == whole
