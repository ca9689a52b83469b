"""Tenants with real processes: keys from a file that is read again, caches and limits of their own, fair admission."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from baton.tests.integration.cluster import Cluster
from baton.tests.integration.prompts import LONG

ROOT = "root-key"


def write(file: Path, **tenants: str) -> None:
    """Each tenant's key is its name; the value has its further fields."""
    keys = {name: hashlib.sha256((ROOT if name == "root" else name).encode()).hexdigest() for name in tenants}
    file.write_text("".join(f'[{name}]\nkeys_sha256 = ["{keys[name]}"]\n{more}\n' for name, more in tenants.items()))


def ask(cluster: Cluster, key: str, path: str = "/v1/completions", **more: Any) -> httpx.Response:
    body = {"model": cluster.nodes.model, "prompt": LONG[3], "temperature": 0, "max_tokens": 4, **more}
    headers: Mapping[str, str] = {"authorization": f"Bearer {key}"}
    if path == "/v1/completions":
        return httpx.post(f"{cluster.url}{path}", json=body, headers=headers, timeout=120)
    return httpx.get(f"{cluster.url}{path}", headers=headers, timeout=60)


def cached(answer: httpx.Response) -> int:
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_tenants_of_a_file(tmp_path: Path) -> None:
    """Guards the whole way of a key: from the file, over SIGHUP, to the workers' caches and the proxy's metrics."""
    file = tmp_path / "tenants.toml"
    shared = 'cache = "shared"'
    write(file, a="", b="requests_per_minute = 3", c=shared, d=shared, root="admin = true")
    with Cluster(tenants=file, api_key=ROOT, log_folder=tmp_path) as cluster:
        assert ask(cluster, "unknown").status_code == 401
        assert [cached(ask(cluster, key)) > 0 for key in ("a", "b", "a", "b")] == [False, False, True, True]
        assert [cached(ask(cluster, key)) > 0 for key in ("c", "d")] == [False, True]
        assert cached(ask(cluster, "b", cache_salt="own")) == 0
        refused = ask(cluster, "b")
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 1
        assert ask(cluster, "a", "/metrics").status_code == 403
        assert 'baton:tenant_rejected_total{reason="requests",tenant="b"} 1.0' in cluster.metrics()

        write(file, a="", new="", root="admin = true")
        os.kill(cluster.nodes.pid("proxy"), signal.SIGHUP)
        cluster.wait_until(lambda: "tenants_reloaded" in cluster.nodes.log("proxy"), "the new file")
        assert [ask(cluster, key).status_code for key in ("b", "new")] == [401, 200]
        assert cached(ask(cluster, "a")) > 0
        file.write_text("[a]\n")
        os.kill(cluster.nodes.pid("proxy"), signal.SIGHUP)
        cluster.wait_until(lambda: "tenants_kept" in cluster.nodes.log("proxy"), "the refusal of the file")
        assert ask(cluster, "new").status_code == 200
        cluster.wait_idle()
