"""The host's KV store with real workers: answers equal those of `transformers`, whether KV was computed or loaded, and
when the store fails.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from pathlib import Path

from baton.tests.integration.cluster import Cluster
from baton.tests.integration.conftest import MAX_TOKENS, Oracle
from baton.tests.integration.prompts import LONG

BLOCK = 16
ALWAYS = ("--store-loads", "always")
"""Tests must not depend on which is faster here, loading or computing."""


@dataclass(slots=True)
class Asked:
    """Totals over some requests."""

    texts: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    generated_tokens: int = 0
    """By decode."""
    computed_tokens: int = 0
    """Of the prompts."""


def _tokens(cluster: Cluster, source: str) -> float:
    """Prompt tokens that the live prefill workers took from this source."""
    return sum(cluster.worker_values(f"prompt_tokens_{source}_total").values())


def _written(cluster: Cluster) -> float:
    return sum(cluster.worker_values("store_written_blocks_total").values())


def _wait_attached(cluster: Cluster, workers: int) -> None:
    def attached() -> bool:
        return list(cluster.worker_values("store_attached").values()) == [1.0] * workers

    cluster.wait_until(attached, f"{workers} workers at the store")


def _restart_workers(cluster: Cluster) -> None:
    """Kill all workers at once with SIGKILL, and start others."""
    for name in ("prefill-0", "prefill-1", "decode-0"):
        cluster.nodes.kill(name)
    cluster.nodes.revive()
    _wait_attached(cluster, 3)


def _settle(cluster: Cluster, prompt_tokens: int, generated_tokens: int) -> None:
    """Wait until the workers have reported this much work and hold nothing: write-behind has finished.

    Idle metrics alone are not enough: a heartbeat from before the last request shows them too.
    """

    def is_reported() -> bool:
        taken = {name: value for name, value in cluster.worker_values("prompt_tokens_total").items() if name[0] == "p"}
        generated = cluster.worker_values("generated_tokens_total").values()
        return sum(taken.values()) >= prompt_tokens and sum(generated) >= generated_tokens

    cluster.wait_until(is_reported, "the work that was done")
    cluster.wait_idle()


def _ask(cluster: Cluster, oracle: Oracle, prompts: list[str]) -> Asked:
    """Send each prompt, and compare the answers with the oracle."""
    asked = Asked()
    for prompt, expected in zip(prompts, oracle.answers(prompts), strict=True):
        answer = cluster.complete(prompt, max_tokens=MAX_TOKENS)
        text, usage = answer["choices"][0]["text"], answer["usage"]
        assert (text, usage["completion_tokens"]) == expected, prompt
        asked.texts.append(text)
        asked.prompt_tokens += usage["prompt_tokens"]
        asked.generated_tokens += usage["completion_tokens"] - 1  # prefill generates the first one
        asked.computed_tokens += usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
    return asked


def test_a_restart_of_every_worker_loses_no_hit(oracle: Oracle, tmp_path: Path) -> None:
    """Guards hits across workers and their restarts, including blocks that decode generated. Blocks on disk survive a
    restart of the store itself."""
    store = ("--ram-gib", "0.1", "--disk-gib", "0.1", "--path", str(tmp_path / "kv"))
    with Cluster(2, 1, store_args=store, worker_args=ALWAYS, log_folder=tmp_path) as cluster:
        _wait_attached(cluster, 3)
        cluster.wait_until(lambda: cluster.store_value("disk_size_bytes") > 0, "a disk")
        prompts = LONG[:6]
        first = _ask(cluster, oracle, prompts)
        _settle(cluster, first.prompt_tokens, first.generated_tokens)
        cluster.wait_until(lambda: cluster.store_value("ram_blocks") == _written(cluster) > 0, "what the store holds")
        _restart_workers(cluster)
        turns = [prompt + text + " And then" for prompt, text in zip(prompts, first.texts, strict=True)]
        lengths = [
            (len(oracle.tokenizer(turn.removesuffix(" And then")).input_ids), len(oracle.tokenizer(turn).input_ids))
            for turn in turns
        ]
        # The last token of an answer has no KV yet: a block that it completes is not stored.
        best = sum(whole - (known - 1) // BLOCK * BLOCK for known, whole in lengths)
        second = _ask(cluster, oracle, turns)
        assert second.computed_tokens <= best
        cluster.wait_until(lambda: _tokens(cluster, "ram") > 0, "tokens from RAM")
        loading = [line for line in cluster.metrics() if line.startswith("baton:request_stage_seconds_sum{")]
        assert [line for line in loading if 'stage="tier_load"' in line and not line.endswith(" 0.0")], loading
        # Blocks that were used twice are on disk or queued for it; a store that shuts down in order writes the rest.
        _settle(cluster, second.prompt_tokens, second.generated_tokens)
        cluster.nodes.signal("store", signal.SIGTERM)
        assert cluster.wait_end("store") == 0
        cluster.nodes.start_node("store")
        _restart_workers(cluster)
        cluster.wait_until(lambda: cluster.store_value("disk_blocks") > 0, "blocks on disk")
        assert _ask(cluster, oracle, turns).computed_tokens <= best
        cluster.wait_until(lambda: _tokens(cluster, "disk") > 0, "tokens from disk")


def test_the_store_is_killed_frozen_and_restarted(oracle: Oracle, tmp_path: Path) -> None:
    """Guards requests against a store that is killed, frozen or restarted empty; hits resume without intervention."""
    with Cluster(1, 1, store_args=("--ram-gib", "0.1"), worker_args=ALWAYS, log_folder=tmp_path) as cluster:
        _wait_attached(cluster, 2)
        _ask(cluster, oracle, LONG[:2])
        streams = [cluster.begin(prompt, max_tokens=32) for prompt in LONG[:6]]
        cluster.nodes.kill("store")
        for (text, _), stream in zip(oracle.answers(LONG[:6]), streams, strict=True):
            assert stream.join().error is None and stream.text == text
        _ask(cluster, oracle, LONG[6:8])
        cluster.wait_until(lambda: all(cluster.worker_values("store_disconnects_total").values()), "a store lost")
        cluster.nodes.start_node("store")
        _wait_attached(cluster, 2)
        asked = _ask(cluster, oracle, LONG[8:])
        _settle(cluster, asked.prompt_tokens, asked.generated_tokens)
        cluster.nodes.kill("prefill-0")
        cluster.nodes.revive()
        _wait_attached(cluster, 2)
        _ask(cluster, oracle, LONG[8:])
        cluster.wait_until(lambda: _tokens(cluster, "ram") > 0, "tokens from RAM")
        cluster.nodes.signal("store", signal.SIGSTOP)
        _ask(cluster, oracle, LONG[:1])
        cluster.nodes.signal("store", signal.SIGCONT)
        _wait_attached(cluster, 2)


def test_the_files_on_disk_are_lost_and_damaged_while_the_store_runs(oracle: Oracle, tmp_path: Path) -> None:
    """Guards the disk: what lies there is a cache, so whatever becomes of it, requests succeed, the store lives on, and
    blocks are written and read again without a restart."""
    store = ("--ram-gib", "0.1", "--disk-gib", "0.1", "--path", str(tmp_path / "kv"))
    with Cluster(1, 1, store_args=store, worker_args=ALWAYS, log_folder=tmp_path) as cluster:
        _wait_attached(cluster, 2)
        pid = cluster.nodes.pid("store")
        cluster.wait_until(lambda: cluster.store_value("disk_size_bytes") > 0, "a disk")
        _ask(cluster, oracle, LONG[:2])
        cluster.wait_until(lambda: cluster.store_value("disk_blocks") > 0, "blocks on disk")
        (folder,) = (tmp_path / "kv").glob("*/data")
        (folder / "slots").unlink()
        with (folder / "index" / "data.mdb").open("r+b") as index:
            index.write(bytes(1 << 16))
            index.truncate(1 << 16)
        _ask(cluster, oracle, LONG[:4])
        cluster.wait_until(lambda: cluster.nodes.log("store").count("tier_reopened") == 1, "the disk again")
        cluster.wait_until(lambda: cluster.store_value("disk_size_bytes") > 0, "its size")
        _ask(cluster, oracle, LONG[:4])
        cluster.wait_until(lambda: cluster.store_value("disk_blocks") > 0, "blocks on disk again")
        assert cluster.nodes.pid("store") == pid and "store" in cluster.nodes.running()
