"""Workers of several GPUs in the simulation: what their steps take, their planes, and when `place` considers them."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from baton.node.errors import SettingsError
from baton.proxy.settings import ProxySettings
from baton.simulator.bounds import Bound
from baton.simulator.latency import Cost, load_profile
from baton.simulator.parallel import ONE, WorkerSize, fits, of_size, rank_gib, with_steps
from baton.simulator.placement import Split, bound_of, promising, splits, wider_splits
from baton.simulator.record import Slo, summarise
from baton.simulator.simulation import Loss, Scenario, SimOutcome, simulate
from baton.simulator.workload import LengthSampler, SimRequest, poisson

PROFILE, LARGE = load_profile("h200-baton-8b"), load_profile("h200-llama-70b")
SMALL = msgspec.structs.replace(PROFILE, max_num_seqs=24)
LOAD = poisson(25, 12.0, LengthSampler(3000, 0.7, 20_000), LengthSampler(40, 0.6, 400), seed=5)


def run(prefill: WorkerSize, decode: WorkerSize, *losses: Loss, load: list[SimRequest] = LOAD) -> SimOutcome:
    outcome = simulate(
        Scenario(
            profile=SMALL,
            prefill=2 if losses else 1,
            decode=2 if losses else 1,
            prefill_size=prefill,
            decode_size=decode,
            proxy=ProxySettings(local_prefill="never", policy="least-loaded"),
            losses=losses,
        ),
        load,
    )
    assert [record.error for record in outcome.records] == [""] * len(load)
    return outcome


def test_steps_of_ranks_are_shorter_by_their_part_and_longer_by_their_sums() -> None:
    """Guards against ranks that cost nothing, and a pool that holds the weights of all ranks."""
    two, eight = of_size(PROFILE, WorkerSize(2)), of_size(PROFILE, WorkerSize(8))
    assert two.decode.a == pytest.approx(PROFILE.decode.a / 2 + 64 * 2.5e-6)
    assert eight.decode.a > PROFILE.decode.a / 8 + 0.0007
    assert PROFILE.prefill.b / 2 < two.prefill.b < PROFILE.prefill.b
    assert PROFILE.num_blocks == of_size(PROFILE, ONE).num_blocks and two.num_blocks > 2 * PROFILE.num_blocks
    assert rank_gib(PROFILE, WorkerSize(2))[0] == pytest.approx(rank_gib(PROFILE, ONE)[0] / 2)
    for size in (WorkerSize(8), WorkerSize(2, 2), WorkerSize(1, 4)):
        assert sum(rank_gib(PROFILE, size)) * 2**30 <= PROFILE.parallel.gpu_bytes  # type: ignore[union-attr]
    with pytest.raises(SettingsError, match="3 ranks: must be one of 1, 2, 4, 8"):
        of_size(PROFILE, WorkerSize(3))
    with pytest.raises(SettingsError, match="nothing of workers of several GPUs"):
        of_size(load_profile("cpu-demo"), WorkerSize(2))


def test_measured_steps_count_before_arithmetic() -> None:
    """Guards against measured steps of ranks that nothing reads."""
    measured = {"prefill": Cost(0.001, 1e-5, 0.0), "decode": Cost(0.00296, 2e-8, 5e-6)}
    fitted = with_steps(PROFILE, 2, measured)
    assert of_size(fitted, WorkerSize(2)).decode == measured["decode"]
    assert of_size(fitted, WorkerSize(4)).decode == of_size(PROFILE, WorkerSize(4)).decode
    assert with_steps(PROFILE, 1, measured).decode == measured["decode"]
    with pytest.raises(SettingsError, match="--tp 2: needs prefill and decode steps"):
        with_steps(PROFILE, 2, {"decode": measured["decode"]})


@pytest.mark.parametrize("sizes", [((2, 1), (4, 1)), ((4, 1), (1, 1)), ((2, 2), (2, 1))], ids=str)
def test_sharded_planes_move_all_of_every_block(sizes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    """Guards against pieces that are left out, or moved twice, and transfers that a group of ranks never ends."""
    plain = run(ONE, ONE)
    found = run(*(WorkerSize(*size) for size in sizes))
    assert found.moved_bytes == plain.moved_bytes
    assert summarise(found.records).ttft.p50_s < summarise(plain.records).ttft.p50_s


def test_a_lost_worker_of_several_gpus_takes_all_its_planes_with_it() -> None:
    """Guards against ranks that go on sending for a worker that is dead."""
    outcome = run(WorkerSize(2, 2), WorkerSize(2), Loss(0.6, "p0"), Loss(1.1, "d1"))
    assert outcome.counters["retries_total"]


def test_stages_compute_several_prompts_at_once() -> None:
    """Guards against stages that wait for one another, and against prompts that pass two of them in the time of one."""
    busy = poisson(20, 60.0, LengthSampler(4000), LengthSampler(4), seed=2)
    alone, two = run(ONE, ONE, load=busy), run(WorkerSize(1, 2), ONE, load=busy)
    assert 1.5 < summarise(alone.records).ttft.mean_s / summarise(two.records).ttft.mean_s < 2.5
    idle = [replace(busy[0], arrival_s=0.0)]
    ratio = summarise(run(WorkerSize(1, 2), ONE, load=idle).records).ttft.mean_s
    assert ratio >= summarise(run(ONE, ONE, load=idle).records).ttft.mean_s


def test_sizes_are_considered_where_a_model_needs_or_gains_from_them() -> None:
    """Guards against hundreds of searches, and against splits of a model that one GPU cannot hold."""
    assert not fits(LARGE, ONE) and fits(LARGE, WorkerSize(2)) and fits(PROFILE, ONE)
    with pytest.raises(SettingsError, match="leave no room for KV on 1 GPUs"):
        of_size(LARGE, ONE)
    of_large = [bound_of(split, LOAD, LARGE, Slo(9.0, 0.1), "auto") for split in wider_splits(4, [512], (2, 4))]
    assert all(bound.rate > 0.0 for bound in of_large), "no part of it is reckoned with one GPU a worker"
    wider = wider_splits(4, [512], (1, 2))
    assert [split.name for split in wider] == [
        "2P1D tp1/2",
        "1P2D tp2/1",
        "1P1D tp2/2",
        "2 colocated tp2, chunks of 512",
        "2 adaptive tp2",
    ]
    assert {split.gpus for split in wider} == {4}
    plain = [(split, Bound(2.0, "")) for split in splits(4, [512])]
    bounds = [(split, Bound(rate, "")) for split, rate in zip(wider, (2.5, 3.0, 4.0, 2.0, 5.0), strict=True)]
    found = [split.name for split, _ in promising(plain, bounds)]
    assert found == ["1P1D tp2/2", "1P2D tp2/1", "2 adaptive tp2"], "two at most, and none that one GPU a worker beats"


def test_wider_decode_workers_meet_a_tpot_that_one_gpu_cannot() -> None:
    """Guards the bound of a split whose roles have different sizes."""
    requests = poisson(30, 1.0, LengthSampler(1000), LengthSampler(50), seed=1)
    slo = Slo(1.0, 0.003)
    assert bound_of(Split(1, 3), requests, PROFILE, slo, "auto").rate == 0.0
    assert bound_of(Split(2, 1, decode_tp=2), requests, PROFILE, slo, "auto").rate > 0.0
