"""How fast a worker computes prompts when it is busy, for the router. Pure.

Only full steps count: a step of a few tokens is as slow as its overhead, and a worker that was sent only what it had
cached would look slow for it, and be sent no more.
"""

from __future__ import annotations

FULL_PART = 0.5
"""A step is full from this part of the token budget on."""
KEEP = 0.9
"""What the steps before count for, at each step."""


class PromptSpeed:
    """Prompt tokens a second; `budget_tokens` is the most that a step takes."""

    def __init__(self, budget_tokens: int) -> None:
        self._least_tokens = FULL_PART * budget_tokens
        self._tokens = 0.0
        self._spent_s = 0.0

    @property
    def tokens_s(self) -> float:
        """0 until a full step was measured."""
        return self._tokens / self._spent_s if self._spent_s else 0.0

    def step(self, num_tokens: int, spent_s: float) -> None:
        """A step took so long."""
        if num_tokens >= self._least_tokens and spent_s > 0:
            self._tokens = KEEP * self._tokens + num_tokens
            self._spent_s = KEEP * self._spent_s + spent_s
