"""What a decode worker measures of its steps: the device's time, as counters, and how fast prompts are computed.

No clock: times are those of the loop and of the device.
"""

from __future__ import annotations

from baton.kvtransfer.store.gate import LoadGate
from baton.models.batch import DeviceTime
from baton.node.counters import DecodeCounters
from baton.worker.in_flight import InFlightStep
from baton.worker.stats import PromptSpeed

SHORT_GAP_S = 50e-6


class StepMeter:
    """For the router, the `gate` of loads from the store, and metrics; `most_prompt_tokens`: of one step."""

    def __init__(self, counters: DecodeCounters, gate: LoadGate, most_prompt_tokens: int) -> None:
        self._counters = counters
        self._gate = gate
        self._speed = PromptSpeed(most_prompt_tokens)

    @property
    def prompt_tokens_s(self) -> float:
        """Prompt tokens a second in full steps; 0 until one was measured."""
        return self._speed.tokens_s

    def ended(self, step: InFlightStep, num_prompt_tokens: int, now: float) -> None:
        """A step was read that computed `num_prompt_tokens` tokens of prompts."""
        took = step.launched.device_time
        if took is not None:
            self._count_device_time(took, step.behind)
        if num_prompt_tokens:
            spent_s = took.busy_s if took else now - step.began_at  # since then it may have waited behind another
            self._gate.computed(num_prompt_tokens, spent_s, now)
            self._counters.prompt_tokens_computed += num_prompt_tokens
            self._speed.add_step(num_prompt_tokens, spent_s)

    def _count_device_time(self, took: DeviceTime, behind: bool) -> None:
        counters = self._counters
        counters.device_busy_seconds += took.busy_s
        if took.mask_wait_s >= SHORT_GAP_S:
            counters.grammar_late_steps += 1
            counters.grammar_late_seconds += took.mask_wait_s
        if behind:
            counters.device_gaps += 1
            counters.device_gap_seconds += took.gap_s
            counters.device_gaps_short += took.gap_s < SHORT_GAP_S
