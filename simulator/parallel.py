"""What steps of a worker of several ranks, or in stages, take: as measured, or by arithmetic from one rank. Pure.

With n ranks, a step of one rank of `a + b x + c y` seconds takes

    decode     a / n + sums * sum_s[n]  +  b / min(n, KV heads) * context  +  c / n * batch
    prefill    a / n + sums * sum_s[n]  +  (b / n + moved) * tokens  +  c / n * pairs

where a sum is inside a norm, twice a layer, and `moved` the time that a link takes for a token's residual in all of
them, 2 (n - 1) / n times each. A chunk passes S stages in the time of one
step and S - 1 hand-overs of its residual; each stage has 1/S of the step. Pools hold what is left beside the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from msgspec.structs import replace

from baton.node.errors import SettingsError
from baton.simulator.latency import Cost, Parallel, Profile, RankSteps

SIZES = (1, 2, 4, 8)


class WorkerSize(NamedTuple):
    """Processes of a worker, each on a GPU."""

    ranks: int = 1
    stages: int = 1

    @property
    def gpus(self) -> int:
        return self.ranks * self.stages


ONE = WorkerSize()


def of_size(profile: Profile, size: WorkerSize) -> Profile:
    """The profile of a worker of this size: its steps from first to last stage, and its pool. SettingsError where the
    profile does not say what that takes, or the model does not fit."""
    parallel = profile.parallel
    if parallel is None and size != ONE:
        raise SettingsError(f"profile {profile.name} says nothing of workers of several GPUs")
    if not fits(profile, size):
        raise SettingsError(f"the weights of {profile.name} leave no room for KV on {size.gpus} GPUs")
    if parallel is None or size == ONE:
        return profile
    if size.ranks not in SIZES:
        raise SettingsError(f"{size.ranks} ranks: must be one of {', '.join(map(str, SIZES))}")
    if size.stages > profile.layout.num_layers:
        raise SettingsError(f"{profile.layout.num_layers} layers in {size.stages} stages")
    prefill, decode = _costs(profile, parallel, size.ranks)
    return replace(profile, prefill=prefill, decode=decode, num_blocks=_blocks(profile, parallel, size))


def fits(profile: Profile, size: WorkerSize) -> bool:
    """Whether a worker of this size has room for the model and a sequence of the full length of a step."""
    if profile.parallel is None:
        return size == ONE
    least = profile.prefill_budget_tokens // profile.layout.block_tokens
    return _blocks(profile, profile.parallel, size) >= least


def hand_over_s(profile: Profile, tokens: int) -> float:
    """Of the residual of so many tokens from a stage to the next."""
    hidden_bytes = profile.parallel.hidden_bytes if profile.parallel is not None else 0
    return profile.chunk_s + tokens * hidden_bytes / profile.link_bytes_s


def rank_gib(profile: Profile, size: WorkerSize) -> tuple[float, float]:
    """GiB of weights and of KV on each GPU of a worker."""
    if profile.parallel is None:
        return 0.0, 0.0
    sized, block_bytes = of_size(profile, size), profile.kv_layout().block_bytes
    held = min(size.ranks, profile.layout.kv_heads) * size.stages
    return profile.parallel.weights_bytes / size.gpus / 2**30, sized.num_blocks * block_bytes / held / 2**30


def _costs(profile: Profile, parallel: Parallel, ranks: int) -> tuple[Cost, Cost]:
    """Of prefill and decode steps."""
    if ranks == 1:
        return profile.prefill, profile.decode
    measured = next((each for each in parallel.measured if each.ranks == ranks), None)
    if measured is not None:
        return measured.prefill, measured.decode
    sum_s = next((each.seconds for each in parallel.sums if each.ranks == ranks), None)
    if sum_s is None:
        raise SettingsError(f"profile {profile.name} says nothing of {ranks} ranks")
    num_sums = 2 * profile.layout.num_layers
    moved = num_sums * parallel.hidden_bytes * 2 * (ranks - 1) / ranks / profile.link_bytes_s
    prefill, decode, fixed = profile.prefill, profile.decode, num_sums * sum_s
    return (
        Cost(prefill.a / ranks + fixed, prefill.b / ranks + moved, prefill.c / ranks),
        Cost(decode.a / ranks + fixed, decode.b / min(ranks, profile.layout.kv_heads), decode.c / ranks),
    )


def _blocks(profile: Profile, parallel: Parallel, size: WorkerSize) -> int:
    """Blocks that the worker has room for: each GPU has its part of the weights and, of every block, of the KV."""
    block_bytes = profile.kv_layout().block_bytes
    free_bytes = parallel.gpu_bytes - parallel.weights_bytes / size.gpus
    return max(0, int(free_bytes * min(size.ranks, profile.layout.kv_heads) * size.stages / block_bytes))


def with_steps(profile: Profile, ranks: int, costs: Mapping[str, Cost]) -> Profile:
    """The profile with measured "prefill" and "decode" steps of a worker of so many ranks; both, but for one rank."""
    if ranks == 1:
        return replace(profile, **costs)
    if profile.parallel is None or set(costs) != {"prefill", "decode"}:
        raise SettingsError(f"--tp {ranks}: needs prefill and decode steps, and a profile with `parallel`")
    found = RankSteps(ranks=ranks, about="fitted", **costs)
    others = tuple(each for each in profile.parallel.measured if each.ranks != ranks)
    return replace(profile, parallel=replace(profile.parallel, measured=(*others, found)))
