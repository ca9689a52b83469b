"""Prefill workers whose second stage is a process that shares no memory with the first, at another address: the answers
are those of one process, the loss of the stage is that of the worker, and no one else is heard in its place.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from baton.launch.cluster import NodeProcess
from baton.launch.local import free_port
from baton.launch.supervisor import ChildSpec
from baton.models.fallback.config import model_config
from baton.node.credentials import Keys, NodeRole
from baton.node.secret_file import read_secret
from baton.testing.adapter_folders import write_adapter
from baton.tests.integration.cluster import NO_TLS, Cluster, start_node
from baton.tests.integration.conftest import DEMO, MAX_TOKENS, Oracle
from baton.tests.integration.prompts import LONG, PROMPTS
from baton.tests.integration.untrusted import RawClient, one_of_each_stage_message
from baton.worker.stages.remote.messages import encode_frames

SOME = PROMPTS[::4]
STAGE_HOST = "127.0.0.2"
TIMEOUT_S = 60.0


class StagedCluster:
    """A cluster with two prefill workers of two stages each, at a store that one of one process has filled."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self._folder = cluster, folder
        cluster.complete(LONG[8], max_tokens=1)
        self.adapted = self.with_adapter("of one process")
        cluster.wait_until(lambda: cluster.worker_values("store_written_blocks_total")["prefill-0"] > 8, "blocks")
        cluster.nodes.kill("prefill-0")
        cluster.nodes.forget("prefill-0")
        self.ports = {worker: free_port() for worker in ("prefill-1", "prefill-2")}
        self.probe_ports = {worker: free_port() for worker in self.ports}
        self.stages: dict[str, NodeProcess] = {}
        for worker, port in self.ports.items():  # in either order
            first = f"tcp://127.0.0.1:{port}"
            if worker == "prefill-1":
                self._start_stage(worker, first)
            cluster.nodes.add_worker("prefill", worker, "--pp", "2", "--stages-bind", first, "--max-chunk-tokens", "16")
            if worker != "prefill-1":
                self._start_stage(worker, first)
        cluster.wait_workers(*self.ports, "decode-0")

    def with_adapter(self, cache_salt: str) -> list[str]:
        """Answers to prompts with the adapter; KV under one salt is not used under another."""
        body = {"model": "adapter", "max_tokens": 8, "ignore_eos": True, "cache_salt": cache_salt}
        streams = [self.cluster.begin(prompt, **body) for prompt in SOME]
        return [stream.join().text for stream in streams]

    def _start_stage(self, worker: str, first: str) -> None:
        probes = ("--probe-port", str(self.probe_ports[worker]))
        own = (
            *probes,
            "--first",
            first,
            "--bind",
            f"tcp://{STAGE_HOST}:0",
            *self.cluster.secret_args,
            "--threads",
            "1",
        )
        module = (sys.executable, "-P", "-m", "baton.worker.stages.remote")
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        spec = ChildSpec(name=f"{worker}-stage", group="stage", argv=(*module, *own), env=env)
        with self._log(worker).open("wb") as log:
            self.stages[worker] = start_node(spec, log)

    def _log(self, worker: str) -> Path:
        return self._folder / f"{worker}-stage.log"

    def log(self, worker: str) -> str:
        """Of its second stage."""
        return self._log(worker).read_text()

    def close(self) -> None:
        for stage in self.stages.values():
            if stage.poll() is None:
                stage.send_signal(signal.SIGKILL)


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StagedCluster]:
    folder = tmp_path_factory.mktemp("logs")
    adapter = write_adapter(folder / "adapter", model_config(DEMO))
    with Cluster(
        proxy_args=("--local-prefill", "never", "--lora-modules", f"adapter={adapter}"),
        worker_args=("--store-loads", "always", "--max-loras", "1"),
        store_args=("--ram-gib", "0.05"),
        log_folder=folder,
    ) as cluster:
        staged = StagedCluster(cluster, folder)
        try:
            yield staged
        finally:
            staged.close()


def test_answers_are_those_of_one_process(staged: StagedCluster, oracle: Oracle) -> None:
    """Guards against layers that get to no decode worker, digests that two hosts make in two ways, and a prefix whose
    sums were forgotten."""
    cluster = staged.cluster
    for _ in range(2):  # again, out of the prefix caches
        streams = [cluster.begin(prompt, max_tokens=MAX_TOKENS) for prompt in SOME]
        assert [stream.join().text for stream in streams] == [text for text, _ in oracle.answers(SOME)]
    for port in staged.probe_ports.values():
        assert httpx.get(f"http://{STAGE_HOST}:{port}/ready", verify=NO_TLS).status_code == 200
    for name in ("steps_total", "transfers_sent_total"):
        assert all(cluster.worker_values(name)[worker] for worker in staged.ports), name
    assert not sum(cluster.worker_values("transfers_failed_total").values())
    assert not sum(cluster.worker_values("digest_retries_total").values())
    cluster.wait_idle()


def test_answers_with_an_adapter_are_those_of_one_process(staged: StagedCluster, oracle: Oracle) -> None:
    """Guards against a stage that computes without its part of an adapter, or with it for requests without one."""
    answers = [staged.with_adapter(f"of stages {time}") for time in range(2)]
    assert answers == [staged.adapted] * 2
    assert staged.adapted != [text for text, _ in oracle.answers(SOME)]
    assert staged.cluster.complete(SOME[0], max_tokens=MAX_TOKENS)["choices"][0]["text"] == oracle.answers(SOME)[0][0]


def test_kv_gets_to_the_store_and_from_it(staged: StagedCluster, oracle: Oracle) -> None:
    """Guards against prefixes that stages compute again, or load into the wrong layers, and KV that stays in them."""
    cluster = staged.cluster
    answer = cluster.complete(LONG[8], max_tokens=MAX_TOKENS)["choices"][0]["text"]
    assert answer == oracle.answers(LONG[8:9])[0][0]
    assert sum(cluster.worker_values("store_loaded_bytes_total")[worker] for worker in staged.ports)
    cluster.wait_until(
        lambda: all(cluster.worker_values("store_written_blocks_total")[worker] for worker in staged.ports),
        "blocks of both workers in the store",
    )
    assert not sum(cluster.worker_values("store_damaged_blocks_total").values())


def test_none_without_the_key_of_a_stage_is_heard_and_one_with_it_disturbs_nothing(
    staged: StagedCluster, oracle: Oracle
) -> None:
    """Guards prompts, residuals and first tokens: a process that joins in the place of a stage would get them."""
    cluster, port = staged.cluster, staged.ports["prefill-1"]
    keys = Keys(read_secret(cluster.nodes.ports.secret_file))
    frames = [encode_frames(number, message) for message in one_of_each_stage_message() for number in (0, 1)]
    frames += [[b"", b""], [b"\xff" * 8, b"\xc1", b""]]
    strangers: list[tuple[Keys | None, NodeRole]] = [(None, "stage"), (Keys(os.urandom(32)), "stage"), (keys, "decode")]
    for own, role in strangers:
        with RawClient(port, b"stranger", keys=own, role=role, server="stage") as stranger:
            for each in frames:
                stranger.frames(*map(bytes, each))
    cluster.wait_until(lambda: "peer_refused" in cluster.nodes.log("prefill-1"), "a refusal", TIMEOUT_S)
    assert "message_rejected" not in cluster.nodes.log("prefill-1")
    with RawClient(port, b"stage", keys=keys, role="stage", server="stage") as insider:
        for each in frames:
            insider.frames(*map(bytes, each))
    cluster.wait_until(lambda: "message_rejected" in cluster.nodes.log("prefill-1"), "a rejection", TIMEOUT_S)
    streams = [cluster.begin(prompt, max_tokens=MAX_TOKENS) for prompt in SOME]
    assert [stream.join().text for stream in streams] == [text for text, _ in oracle.answers(SOME)]
    assert "Traceback" not in cluster.nodes.log("prefill-1")


def test_a_stage_that_dies_in_mid_transfer_ends_its_worker(staged: StagedCluster) -> None:
    """Guards against a worker that goes on without some layers, requests that are lost with it, and KV of which a part
    never came. Chunks are offered to decode while the next ones are in flight."""
    cluster = staged.cluster
    before = cluster.worker_values("steps_total")["prefill-1"]
    prompts = [f"{number} " + " ".join(SOME * 8)[:3000] for number in range(6)]
    streams = [cluster.begin(prompt, max_tokens=4) for prompt in prompts]
    cluster.wait_until(lambda: cluster.worker_values("steps_total")["prefill-1"] > before + 3, "steps")
    staged.stages["prefill-1"].send_signal(signal.SIGKILL)
    assert cluster.wait_end("prefill-1") == 1
    cluster.nodes.forget("prefill-1")
    texts = [stream.join().text for stream in streams]
    assert texts == [cluster.complete(prompt, max_tokens=4)["choices"][0]["text"] for prompt in prompts]
    assert cluster.counter("retries"), "it had prompts"
    cluster.wait_idle()


def test_a_stage_that_is_frozen_ends_its_worker_and_ends_when_it_runs_again(staged: StagedCluster) -> None:
    """Guards against a worker that waits for ever, and a stage that stays behind and joins no other worker."""
    staged.stages["prefill-2"].send_signal(signal.SIGSTOP)
    assert staged.cluster.wait_end("prefill-2") == 1
    assert "stage 1 does not answer" in staged.cluster.nodes.log("prefill-2")
    staged.cluster.nodes.forget("prefill-2")
    staged.stages["prefill-2"].send_signal(signal.SIGCONT)
    assert staged.stages["prefill-2"].wait(TIMEOUT_S) == 1
    assert "stage_stopped" in staged.log("prefill-2")
