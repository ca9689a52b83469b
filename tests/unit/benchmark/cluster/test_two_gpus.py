"""Guards `baton bench two-gpus`: what is compared with what, and that both systems get the same."""

from __future__ import annotations

from dataclasses import replace

import pytest

from baton.benchmark.cluster import two_gpus as bench
from baton.benchmark.cluster.running import ServedModel
from baton.benchmark.cluster.two_gpus import System, Workload, ratios, systems


def test_a_workload_is_read() -> None:
    """A rate lost, or lengths swapped, would measure something else."""
    found = Workload.parse("8192/256@2,3.5")
    assert found == Workload(8192, 256, (2.0, 3.5))
    assert str(found) == "8192/256"


@pytest.mark.parametrize("text", ["8192/256", "8192/1@2", "0/4@2", "8192/256@0", "a/b@2"])
def test_a_wrong_workload_is_refused(text: str) -> None:
    """Before the machine is used, not after the first system."""
    with pytest.raises(ValueError):
        Workload.parse(text)


def test_systems_differ_in_their_roles_alone() -> None:
    """Another chunk size, plane or context for one side would decide the comparison."""
    arguments = ["--colocated-chunk-tokens", "512", "2048", "--plane", "nccl", "--workload", "8000/200@2"]
    options = bench._options(arguments)
    found = {
        str(system): system.serve(ServedModel("m", ("--load-format=dummy",), 64, 1), options)
        for system in systems(options)
    }
    assert list(found) == ["disagg", "auto", "adaptive", "colocated-512", "colocated-2048"]
    ours, theirs = found["disagg"], found["colocated-2048"]
    assert (ours.prefill, ours.decode, ours.local_prefill) == (1, 1, "never")
    assert (theirs.prefill, theirs.decode, theirs.local_prefill) == (0, 2, "always")
    assert ours.worker_arg == ("--load-format=dummy", "--max-model-len=9216", "--plane=nccl")
    assert theirs.worker_arg == (*ours.worker_arg, "--max-chunk-tokens=2048")
    assert replace(ours, local_prefill="auto") == found["auto"]
    assert replace(ours, local_prefill=None, roles="adaptive") == found["adaptive"]
    assert ours.proxy_arg == ("--slo-ttft-ms=1000", "--slo-tpot-ms=15")
    assert ours.gpus == theirs.gpus == (0, 1)


def test_a_cpu_needs_no_gpu() -> None:
    """The script must be tried before a machine is borrowed."""
    options = bench._options(["--device", "cpu", "--systems", "colocated"])
    (system,) = systems(options)
    settings = system.serve(ServedModel("demo", (), 16, 1), options)
    assert (str(system), settings.gpus, settings.worker_arg) == ("colocated", (), ())


def line(system: str, tpot: float, rate: float = 7.0) -> dict[str, object]:
    latency = {"p50": 10.0, "p99": 0.0}
    values = {"ttft_ms": latency, "itl_ms": latency, "tpot_ms": {"p50": tpot, "p99": 2 * tpot}, "goodput": 1.0}
    return {"system": system, "workload": "2048/512", "rate": rate, **values}


def test_ratios_are_of_the_same_workload_and_rate() -> None:
    """And of disaggregated to colocated: below 1 is better."""
    ours = [line(str(System(name)), tpot) for name, tpot in (("disagg", 6.0), ("auto", 6.8))]
    found = ratios([*ours, line("colocated-512", 8.0), line("colocated-512", 9.0, rate=14.0)])
    assert [(each["system"], each["tpot_p50"]) for each in found] == [("disagg", 0.75), ("auto", 0.85)]
    assert {(each["against"], each["rate"], each["ttft_p99"]) for each in found} == {("colocated-512", 7.0, None)}
