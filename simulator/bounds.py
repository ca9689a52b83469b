"""The rate that a split of workers cannot exceed, by arithmetic: `place` simulates no split that cannot win. Pure.

With S the seconds of a mean prompt on a prefill worker, L the same on a decode worker beside its steps, A those of the
rows of a mean answer, a the fixed part of a decode step, and T the objective of TPOT, x prefill and y decode workers
serve at most R requests a second, where

    R A <= y (1 - a/T)                       each row gets a token in T
    R (S - H) <= x                           H: seconds of the prompts that decode workers compute
    R (A + H L/S) <= y (1 - a/T)

`--local-prefill never` has H = 0, colocated serving x = 0. A tenth of the requests may miss the objectives, so the
result is divided by 0.9. Prompts that share a prefix are computed once. Queues and bursts make the true rate lower.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from baton.simulator.latency import Profile
from baton.simulator.record import ENOUGH, Slo
from baton.simulator.workload import SimRequest


@dataclass(frozen=True, slots=True)
class Bound:
    """No more requests a second than `rate`; `reason` says what takes all of the time there is."""

    rate: float
    reason: str


@dataclass(frozen=True, slots=True)
class MeanWork:
    """What a mean request takes, in seconds of a worker."""

    prompt_s: float
    """Its prompt on a prefill worker, without the fixed part of the step, which prompts share."""
    local_s: float
    """Its prompt on a decode worker, beyond the fixed parts of the steps that decode as well."""
    answer_s: float
    """Of the rows of its answer, without the fixed parts of the steps."""
    answer_tokens: float
    context: float
    """Tokens, the mean over the tokens of answers."""
    slow_prompts: float
    """Part of the prompts that take longer than the objective of TTFT on an idle worker."""


def mean_work(requests: Sequence[SimRequest], profile: Profile, slo: Slo, prefill: Profile | None = None) -> MeanWork:
    """profile: of decode workers; prefill: of prefill workers, where these are of another size."""
    decode, count = profile.decode, len(requests)
    of_prompt = (prefill or profile).prefill
    prompt_s = local_s = answer_s = context = 0.0
    slow, seen = 0, set[int]()
    for request in requests:
        prompt, answer = request.prompt_tokens, request.output_tokens
        known = next((n for n, name in enumerate(request.prefix) if name not in seen), len(request.prefix))
        seen.update(request.prefix)
        start = min(known * request.block_tokens, prompt - 1)
        prefill_s = of_prompt.seconds(prompt - start, prompt**2 - start**2)
        prompt_s += prefill_s - of_prompt.a
        local_s += _beside_s(profile, start, prompt)
        answer_s += answer * (decode.b * (prompt + answer / 2) + decode.c)
        context += answer * (prompt + answer / 2)
        slow += prefill_s > slo.ttft_s
    tokens = sum(request.output_tokens for request in requests)
    return MeanWork(
        prompt_s / count, local_s / count, answer_s / count, tokens / count, context / max(1, tokens), slow / count
    )


def _beside_s(profile: Profile, start: int, end: int) -> float:
    """Of the prompt's tokens from `start` on, in chunks, beyond the fixed part of the steps."""
    seconds = 0.0
    while start < end:
        stop = min(end, start + profile.decode_chunk_tokens)
        step_s = profile.prefill.seconds(stop - start, stop**2 - start**2)
        seconds += max(step_s - profile.decode.a, profile.decode.c * (stop - start))
        start = stop
    return seconds


def bound(prefill: int, decode: int, local: str, work: MeanWork, profile: Profile, slo: Slo) -> Bound:
    """`local` as --local-prefill; 0 prefill workers are colocated serving."""
    free = 1 - profile.decode.seconds(work.context, 1) / slo.tpot_s
    if work.slow_prompts > 1 - ENOUGH:
        return Bound(0.0, f"{work.slow_prompts:.0%} of the prompts take longer than the TTFT by themselves")
    if free <= 0:
        return Bound(0.0, "a decode step of one answer takes longer than the TPOT")
    free = decode * (1 - profile.decode.a / slo.tpot_s)
    rows = min(profile.max_num_seqs, profile.num_blocks * profile.layout.block_tokens / work.context)
    row_s = work.answer_s / work.answer_tokens
    most_tokens = decode * rows / (profile.decode.a + row_s * rows)
    limits = [
        Bound(_rate(free, work.answer_s), f"answers within the TPOT take all of {decode} decode workers"),
        Bound(most_tokens / work.answer_tokens, f"answers take all of the rows or blocks of {decode} decode workers"),
    ]
    if local == "never" and prefill:
        limits.append(Bound(_rate(prefill, work.prompt_s), f"prompts take all of {prefill} prefill workers"))
    else:
        both = free + prefill * work.local_s / work.prompt_s
        limits.append(Bound(_rate(both, work.answer_s + work.local_s), "prompts and answers take all of the workers"))
    least = min(limits, key=lambda each: each.rate)
    return Bound(least.rate / ENOUGH, least.reason)


def _rate(workers: float, seconds: float) -> float:
    return workers / seconds if seconds else math.inf
