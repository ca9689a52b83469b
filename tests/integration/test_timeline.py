"""One request's timeline on real processes: every stage is reported, and the stages sum to the measured time.

Only sums are compared, never times with a clock of the test.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from baton.proxy.metrics.timeline import FIRST_TOKEN, USUAL
from baton.tests.integration.cluster import Cluster, Stream
from baton.tests.integration.prompts import BEGINNINGS
from baton.tests.integration.test_failures import wait_busy

LENGTH: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster with a slow prefill worker, two tokens a step, so that a test can act while a prompt is computed."""
    cluster = Cluster(
        prefill=2,
        decode=1,
        proxy_args=("--debug-requests", "100", "--slow-request-s", "0", "--local-prefill", "short"),
        prefill_args=("--max-chunk-tokens", "2"),
        prefill_step_s=0.01,
        log_folder=tmp_path_factory.mktemp("logs"),
    )
    with cluster:
        yield cluster


def ended(cluster: Cluster, stream: Stream) -> dict[str, Any]:
    """The record of a stream that has ended, after checking the sums of its timeline."""
    stream.join()
    assert stream.broken is None and stream.error is None and stream.finish == "length"
    answer = httpx.get(f"{cluster.url}/debug/requests/{stream.id}", timeout=60)
    assert answer.status_code == 200, answer.text
    (generation,) = answer.json()["generations"]
    assert [(part["until"], part["complete"]) for part in generation["timeline"]] == [(until, True) for until in USUAL]
    for part in generation["timeline"]:
        assert set(part["stages"]) >= set(USUAL[part["until"]])
        assert all(took_s >= 0.0 for took_s in part["stages"].values())
        assert sum(part["stages"].values()) == pytest.approx(part["total_s"], abs=1e-6)
    assert sum(part["total_s"] for part in generation["timeline"]) == pytest.approx(generation["total_s"], abs=1e-6)
    return dict(generation)


def stages(generation: dict[str, Any], until: str) -> dict[str, float]:
    (found,) = [part["stages"] for part in generation["timeline"] if part["until"] == until]
    return dict(found)


def total(cluster: Cluster, name: str) -> float:
    return sum(float(line.rpartition(" ")[2]) for line in cluster.metrics() if line.startswith(name))


def test_the_stages_of_a_streamed_request_sum_to_its_measured_ttft(cluster: Cluster) -> None:
    """Guards against a mismatch of the workers' stage durations and the TTFT in Prometheus."""
    names = [
        "vllm:time_to_first_token_seconds_sum{",
        'baton:request_stage_seconds_sum{model_name="demo",stage="prefill"',
    ]
    before = [total(cluster, name) for name in names]
    generation = ended(cluster, cluster.begin(" ".join(BEGINNINGS[:4]), **LENGTH))
    ttft_s, prefill_s = (total(cluster, name) - was for name, was in zip(names, before, strict=True))
    first = generation["timeline"][0]
    assert first["total_s"] == pytest.approx(ttft_s, abs=1e-6)
    assert first["stages"]["prefill"] == pytest.approx(prefill_s, abs=1e-6)
    for until, worked in ((FIRST_TOKEN, ("tokenise", "prefill", "reply")), ("second_token", ("first_step",))):
        assert all(stages(generation, until)[stage] > 0.0 for stage in worked)
    (attempt,) = generation["attempts"]
    assert attempt["prefill"].startswith("p") and attempt["decode"].startswith("decode-0/")
    assert generation["generated_tokens"] == LENGTH["max_tokens"] and len(generation["prefix_hash"]) == 16


def test_a_prompt_that_decode_computed_itself_has_no_transfer(cluster: Cluster) -> None:
    """Guards local prefill: queue and prefill are those of the decode worker, and there is no transfer."""
    generation = ended(cluster, cluster.begin("Once upon a time", **LENGTH))
    (attempt,) = generation["attempts"]
    assert attempt["prefill"] == "" and not attempt["handed_over"]
    assert stages(generation, FIRST_TOKEN)["prefill"] > 0.0
    second = stages(generation, "second_token")
    assert second["first_step"] > 0.0 and second["transfer_wait"] == second["transfer"] == 0.0


def test_a_dead_worker_shows_as_a_retry(cluster: Cluster) -> None:
    """Guards what an operator sees of a failure: the worker, and the lost time."""
    stream = cluster.begin(" ".join((BEGINNINGS * 40)[7:47]), **LENGTH)
    busy = wait_busy(cluster, "p")
    cluster.nodes.kill(busy)
    generation = ended(cluster, stream)
    first, second = generation["attempts"]
    assert first["prefill"].startswith(f"{busy}/") and "lost" in first["end"] and second["end"] == ""
    assert stages(generation, FIRST_TOKEN)["retry"] > 0.0 and stages(generation, FIRST_TOKEN)["prefill"] > 0.0


def test_slow_requests_are_logged_without_their_text(cluster: Cluster) -> None:
    """Guards the log line of slow requests, and the privacy of their text."""
    stream = cluster.begin("The old fox waited quietly by the river until morning came and the frogs sang", **LENGTH)
    generation = ended(cluster, stream)
    lines = [line for line in cluster.nodes.log("proxy").splitlines() if f"request_slow request_id={stream.id}" in line]
    assert len(lines) == 1
    assert f"prompt_tokens={generation['prompt_tokens']}" in lines[0] and "first_token.prefill_s=" in lines[0]
    assert "quietly" not in cluster.nodes.log("proxy")
