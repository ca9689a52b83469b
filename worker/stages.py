"""Where the time of one leg goes inside a worker: stamps of its own clock, told to the proxy as durations.

A leg tells its stages twice at most: with its first token, and with the one that decode's first step draws after it.
It knows no clock: whoever stamps says what time it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.node.messages.control import Stages


@dataclass(slots=True)
class LegTimes:
    """The stamps of one leg, in seconds of the worker's clock."""

    received_at: float
    tier_load_s: float = 0.0
    """Part of the wait in the queue in which KV of the prompt came from a tier; set by whoever loads it."""
    loaded_tokens: tuple[int, ...] = ()
    """So many tokens from each tier."""
    open: bool = True
    """There is something left to tell: looked at for every token, so that `begin` and `drew` need not be called."""
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
        """The step that began at `began_at` drew a token: the stages since the leg began, or since it last told."""
        if self._ready_at is None:
            return self.prefilled(now)
        self.open = False
        return Stages(
            transfer_wait_s=self._wait_s,
            transfer_s=self._transfer_s,
            admission_s=max(0.0, began_at - self._ready_at),
            step_s=max(0.0, now - began_at),
        )
