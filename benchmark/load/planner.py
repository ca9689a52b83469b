"""Settings, a rate and a seed -> the plan of one run. Reads the trace or the prompt file, once; pure after that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from baton.benchmark.load import arrivals
from baton.benchmark.load.plan import Conversation, Plan, Turn
from baton.benchmark.load.settings import DEFAULT_NUM_PROMPTS, ServingSettings
from baton.benchmark.load.traces import TraceRequest, quantum_of, read_trace
from baton.benchmark.load.workload import (
    Lengths,
    file_turns,
    random_turns,
    trace_turn,
    warmup_turns,
    with_cancels,
)
from baton.node.errors import SettingsError


@dataclass(frozen=True, slots=True)
class Inputs:
    """What was read from files."""

    trace: tuple[TraceRequest, ...]
    prompt_lines: tuple[str, ...]


def read_inputs(settings: ServingSettings) -> Inputs:
    """Raises SettingsError where a file is missing or wrong."""
    trace = read_trace(_lines(settings.trace)) if settings.trace else []
    return Inputs(tuple(trace), tuple(_lines(settings.dataset_path)) if settings.dataset_path else ())


def make_plan(settings: ServingSettings, inputs: Inputs, rate: float | None, seed: int) -> Plan:
    """The run at one of `settings.rates`."""
    if inputs.trace:
        times_s, turns = _from_trace(settings, inputs.trace, rate, seed)
    else:
        count = _count(settings, rate)
        times_s, turns = _times(settings, count, rate, seed), _turns(settings, inputs, count, seed)
    conversations = [
        Conversation(due_s, of_one, settings.think_s)
        for due_s, of_one in zip(times_s, with_cancels(turns, settings.cancel_rate, seed), strict=True)
    ]
    return Plan(
        conversations=tuple(sorted(conversations, key=lambda conversation: conversation.due_s)),
        warmups=_warmups(settings, turns),
        scheduled=rate is None or math.isfinite(rate),
    )


def _count(settings: ServingSettings, rate: float | None) -> int:
    if settings.duration_s is not None:
        assert rate is not None, "the settings were checked"
        return max(1, round(rate * settings.duration_s))
    return settings.num_prompts or DEFAULT_NUM_PROMPTS


def _times(settings: ServingSettings, count: int, rate: float | None, seed: int) -> list[float]:
    if rate is None:
        exponential = settings.ramp_up_strategy == "exponential"
        shape = arrivals.Ramp(settings.ramp_up_start_rps, settings.ramp_up_end_rps, exponential)
        return arrivals.ramp(count, shape, settings.burstiness, seed)
    if math.isinf(rate):
        return arrivals.all_at_once(count)
    if settings.arrivals == "constant":
        return arrivals.constant(count, rate)
    return arrivals.gamma(count, rate, settings.burstiness, seed)


def _turns(settings: ServingSettings, inputs: Inputs, count: int, seed: int) -> Sequence[tuple[Turn, ...]]:
    if inputs.prompt_lines:
        return file_turns(inputs.prompt_lines, count, settings.random_output_len)
    return random_turns(_lengths(settings), count, settings.turns, seed)


def _from_trace(
    settings: ServingSettings, trace: Sequence[TraceRequest], rate: float | None, seed: int
) -> tuple[list[float], Sequence[tuple[Turn, ...]]]:
    jitter_s = quantum_of(trace) if settings.trace_jitter_s is None else settings.trace_jitter_s
    chosen = trace[: settings.num_prompts]  # all, where no number is given
    own_s = arrivals.spread(
        [request.at_s / settings.trace_speed for request in chosen], jitter_s / settings.trace_speed, seed
    )
    if rate is None:
        times_s = own_s
    elif math.isinf(rate):
        times_s = arrivals.all_at_once(len(own_s))
    else:
        times_s = arrivals.scaled_to_rate(own_s, rate)
    kept = [
        (at_s, (trace_turn(number, request, settings.trace_length_scale),))
        for number, (at_s, request) in enumerate(zip(times_s, chosen, strict=True))
        if settings.duration_s is None or at_s <= settings.duration_s
    ]
    if not kept:
        raise SettingsError(f"no request of the trace is due within {settings.duration_s} s")
    return [at_s for at_s, _ in kept], [turns for _, turns in kept]


def _warmups(settings: ServingSettings, turns: Sequence[tuple[Turn, ...]]) -> tuple[Turn, ...]:
    """Random prompts as long as the run's are on average."""
    if not settings.trace:
        return warmup_turns(_lengths(settings), settings.num_warmups)
    first = [of_one[0] for of_one in turns]
    mean_input = round(sum(turn.prompt_tokens or 0 for turn in first) / len(first))
    mean_output = round(sum(turn.max_tokens for turn in first) / len(first))
    return warmup_turns(Lengths(max(1, mean_input), max(1, mean_output), 0.0, 0, 1), settings.num_warmups)


def _lengths(settings: ServingSettings) -> Lengths:
    return Lengths(
        settings.random_input_len,
        settings.random_output_len,
        settings.random_range_ratio,
        settings.random_prefix_len,
        settings.num_prefixes,
    )


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"cannot read {path}: {error}") from None
