"""What a decode worker has done since it began, for its heartbeat. Only ever grows."""

from __future__ import annotations

from dataclasses import dataclass

from baton.worker.stats import PromptSpeed


@dataclass(slots=True)
class Tally:
    """Tokens, but for the two named otherwise."""

    speed: PromptSpeed
    steps: int = 0
    preemptions: int = 0
    generated: int = 0
    prompts: int = 0
    cached: int = 0
    local: int = 0
    """Of prompts that this worker computes itself."""
    local_cached: int = 0
    computed: int = 0

    @classmethod
    def new(cls, budget_tokens: int) -> Tally:
        """Of a worker whose steps take so many tokens at most."""
        return cls(PromptSpeed(budget_tokens))

    def compute(self, num_tokens: int, spent_s: float) -> None:
        """A step computed so many tokens of prompts, beside whatever it decoded."""
        self.computed += num_tokens
        self.speed.add_step(num_tokens, spent_s)

    def counters(self) -> dict[str, float]:
        """By the names that the proxy knows (proxy/counters.py)."""
        return {
            "prompt_tokens": float(self.prompts),
            "local_prefill_tokens": float(self.local),
            "generated_tokens": float(self.generated),
            "prefix_queries_tokens": float(self.prompts),
            "prefix_hits_tokens": float(self.cached),
            "prompt_tokens_gpu": float(self.local_cached),
            "prompt_tokens_computed": float(self.computed),
            "preemptions": float(self.preemptions),
        }
