"""What a worker measures of its work: the stages of each leg, and the speed at which it computes prompts. No clock."""

from __future__ import annotations

from dataclasses import dataclass

from baton.node.messages.control import Stages

FULL_STEP_PART = 0.5
"""A step is full from this part of the token budget on."""
DECAY = 0.9
"""Weight of the earlier steps at each new one."""


class PromptSpeed:
    """Prompt tokens a second in full steps; `budget_tokens` is the most that a step takes.

    Only full steps count: a step of a few tokens is as slow as its overhead, and a worker that was sent only what it
    had cached would look slow for it, and be sent no more.
    """

    def __init__(self, budget_tokens: int) -> None:
        self._least_tokens = FULL_STEP_PART * budget_tokens
        self._tokens = 0.0
        self._spent_s = 0.0

    @property
    def tokens_s(self) -> float:
        """0 until a full step was measured."""
        return self._tokens / self._spent_s if self._spent_s else 0.0

    def add_step(self, num_tokens: int, spent_s: float) -> None:
        """A step computed `num_tokens` tokens of prompts in `spent_s` seconds."""
        if num_tokens >= self._least_tokens and spent_s > 0:
            self._tokens = DECAY * self._tokens + num_tokens
            self._spent_s = DECAY * self._spent_s + spent_s


@dataclass(slots=True)
class StageTimes:
    """The stamps of one leg, in seconds of the worker's clock, from which it reports durations to the proxy.

    A leg reports twice at most: with its first token, and with the one that decode's first step draws after it.
    """

    received_at: float
    tier_load_s: float = 0.0
    """Part of the wait in the queue in which KV of the prompt came from a tier."""
    loaded_tokens: tuple[int, ...] = ()
    """Tokens loaded from each tier."""
    open: bool = True
    """A report is still to come. Checked for every token, so that `begin` and `drew` need not be called."""
    _began_at: float | None = None
    _ready_at: float | None = None
    _wait_s: float = 0.0
    _transfer_s: float = 0.0

    def begin(self, at: float) -> None:
        """A step with tokens of this leg begins; the first one counts."""
        if self._began_at is None:
            self._began_at = at

    def arrive(self, at: float, wait_s: float, transfer_s: float) -> None:
        """The KV and the first token have arrived from elsewhere."""
        self._ready_at, self._wait_s, self._transfer_s = at, wait_s, transfer_s

    def prefilled(self, now: float) -> Stages:
        """The first token of the leg is drawn: the stages up to it."""
        began_at = now if self._began_at is None else self._began_at
        self._ready_at = now
        return Stages(
            queue_s=max(0.0, began_at - self.received_at - self.tier_load_s),
            tier_load_s=self.tier_load_s,
            prefill_s=max(0.0, now - began_at),
            loaded_tokens=self.loaded_tokens,
        )

    def drew(self, began_at: float, now: float) -> Stages:
        """The step that began at `began_at` drew a token: the stages since the leg began, or since the last report."""
        if self._ready_at is None:
            return self.prefilled(now)
        self.open = False
        return Stages(
            transfer_wait_s=self._wait_s,
            transfer_s=self._transfer_s,
            admission_s=max(0.0, began_at - self._ready_at),
            step_s=max(0.0, now - began_at),
        )
