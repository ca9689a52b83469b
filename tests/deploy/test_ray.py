"""`baton ray` on three pretended machines: whatever Ray loses, streams end with the tokens of a run without faults."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.tests.deploy.ray_cluster import Machines, RayCluster, machine_of
from baton.tests.integration.cluster import Stream

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(600)]

PROMPTS = [f"Story number {number}. Once upon a time there was a fox" for number in range(6)]
NUM_TOKENS = 300


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    with Machines(tmp_path_factory.mktemp("ray")) as running:
        yield running


@pytest.fixture(scope="module")
def cluster(machines: Machines, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    output = tmp_path_factory.mktemp("deployment") / "output"
    with RayCluster(machines, output, 4, "--prefill", "1", "--decode", "2", "--orphan-s", "600") as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(cluster: RayCluster) -> list[str]:
    """The texts of a run without faults."""
    return [stream.join().text for stream in begin(cluster)]


def begin(cluster: RayCluster) -> list[Stream]:
    """Seeded streams, one of them for each prompt."""
    return [
        cluster.stream(
            prompt, max_tokens=NUM_TOKENS, min_tokens=NUM_TOKENS, ignore_eos=True, temperature=1.0, seed=seed
        )
        for seed, prompt in enumerate(PROMPTS)
    ]


def begin_and_wait(cluster: RayCluster) -> list[Stream]:
    """Until each has had some tokens."""
    streams = begin(cluster)
    cluster.wait_until(lambda: all(stream.num_chunks > 3 or stream.ended for stream in streams), "first tokens")
    assert not all(stream.ended for stream in streams), "they were over before the fault"
    return streams


def kill(*pids: int) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def texts(streams: list[Stream]) -> list[str]:
    for stream in streams:
        assert stream.join().broken is None and stream.error is None, (stream.broken, stream.error)
    return [stream.text for stream in streams]


def wait_for_successor(cluster: RayCluster, name: str, pid: int) -> None:
    cluster.wait_until(lambda: cluster.processes()[name] != pid, f"another process of {name}")
    role = name.partition("-")[0]
    number = 2 if role == "decode" else 1
    cluster.wait_until(
        lambda: cluster.metric("baton:workers", f'role="{role}"', 'state="ready"') == number, f"{name} serves"
    )


def test_workers_are_added_as_the_objectives_ask_and_nothing_is_left(machines: Machines, tmp_path: Path) -> None:
    """Guards an autoscaler that asks and is not heard. Two workers would miss this objective too: the bound holds."""
    scaled = ("--prefill", "0", "--max-decode", "2", "--proxy-arg=--slo-tpot-ms=1", "--name", "scaled")
    with RayCluster(machines, tmp_path / "output", 2, *scaled) as deployment:
        requests = 0
        while "decode workers: 1 -> 2" not in deployment.output():
            assert deployment.stream(PROMPTS[0], max_tokens=200, ignore_eos=True).join().finish == "length"
            requests += 1
            assert requests < 500
        deployment.wait_until(lambda: deployment.metric("baton:workers", 'role="decode"') == 2, "the second worker")
        processes = deployment.processes()
    assert "decode-1" in processes and "-> 3" not in deployment.output()
    assert not any(os.path.exists(f"/proc/{pid}/fd/1") for pid in processes.values())


def test_a_deployment_outlives_its_command_and_can_be_ended(machines: Machines, tmp_path: Path) -> None:
    """Guards a deployment from the terminal that it was started in, and the cluster from what nothing would end."""
    with RayCluster(machines, tmp_path / "output", 2, "--prefill", "0", "--name", "left") as deployment:
        processes = deployment.processes()
        deployment.kill_command()
        assert deployment.stream(PROMPTS[0], max_tokens=20, ignore_eos=True).join().finish == "length"
        assert deployment.down() == "ended 2 actors\n"
        assert not any(os.path.exists(f"/proc/{pid}/fd/1") for pid in processes.values())


def test_a_killed_worker_is_started_again_by_its_actor(cluster: RayCluster, undisturbed: list[str]) -> None:
    streams = begin_and_wait(cluster)
    pid = cluster.processes()["decode-0"]
    kill(pid)
    assert texts(streams) == undisturbed
    wait_for_successor(cluster, "decode-0", pid)


def test_a_worker_outlives_its_actor_and_gives_way_to_its_successor(
    cluster: RayCluster, undisturbed: list[str]
) -> None:
    """Guards streams of a worker that is well: only what started it has died."""
    streams = begin_and_wait(cluster)
    retries = cluster.metric("baton:retries_total")
    pid = cluster.processes()["decode-1"]
    _, actor, _ = machine_of(pid)
    kill(actor)
    assert texts(streams) == undisturbed
    wait_for_successor(cluster, "decode-1", pid)
    assert "orphaned" in cluster.log("decode-1")
    assert cluster.metric("baton:retries_total") == retries, "the orphan ended its streams itself"


def test_streams_go_on_when_a_machine_is_lost(cluster: RayCluster, undisturbed: list[str]) -> None:
    """Guards the answer and the number of workers: Ray places the actor on another machine."""
    proxy = machine_of(cluster.processes()["proxy"])[0]
    decodes = [name for name in ("decode-0", "decode-1") if machine_of(cluster.processes()[name])[0] != proxy]
    assert decodes, "both decode workers are on the proxy's machine"
    streams = begin_and_wait(cluster)
    name = decodes[0]
    pid = cluster.processes()[name]
    kill(*machine_of(pid))
    assert texts(streams) == undisturbed
    wait_for_successor(cluster, name, pid)


def test_streams_outlive_the_head(machines: Machines, cluster: RayCluster, undisturbed: list[str]) -> None:
    """Guards what is served from Ray's control plane: without it actors end, and their nodes go on. Comes last."""
    nodes = cluster.processes()
    streams = begin_and_wait(cluster)
    kill(machines.head())
    assert texts(streams) == undisturbed
    cluster.wait_until(lambda: cluster.metric("baton:orphaned") == 1, "the proxy's actor has ended")
    cluster.wait_until(lambda: cluster.metric("baton:worker_orphaned") == 3, "the workers' actors have ended")
    assert texts(begin(cluster)) == undisturbed
    for pid in (pid for name, pid in nodes.items() if name != "proxy"):
        os.kill(pid, signal.SIGTERM)
    cluster.wait_until(lambda: cluster.metric("baton:workers") == 0, "the workers have drained")
    os.kill(nodes["proxy"], signal.SIGTERM)
    cluster.wait_until(lambda: not os.path.exists(f"/proc/{nodes['proxy']}/fd/1"), "the proxy has drained")
