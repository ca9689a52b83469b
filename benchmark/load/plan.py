"""The requests of a run: conversations of turns, with the time when each is due. Plain values, made before the run.

A prompt of token ids is a recipe, not a list: a trace of 12,000 prompts of 12,000 tokens would not fit otherwise. Parts
with equal keys hold equal tokens; that is how prompts share prefixes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Part:
    """A run of tokens, determined by its key (and the run's salt); a longer one begins with a shorter one's tokens."""

    key: tuple[int, ...]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class PartsPrompt:
    """Random token ids, or random text, out of parts."""

    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class GivenPrompt:
    """A prompt of a file: text, token ids, or messages of a chat."""

    content: str | tuple[int, ...] | tuple[Mapping[str, str], ...]


Prompt = PartsPrompt | GivenPrompt


@dataclass(frozen=True, slots=True)
class Turn:
    """One request. In a conversation its prompt follows all earlier turns."""

    prompt: Prompt
    max_tokens: int
    cancel_after: int | None = None
    """The client cancels after so many chunks."""

    @property
    def prompt_tokens(self) -> int | None:
        """Of this turn alone; None where only the server knows."""
        if isinstance(self.prompt, PartsPrompt):
            return sum(part.num_tokens for part in self.prompt.parts)
        return len(self.prompt.content) if _are_ids(self.prompt.content) else None


def _are_ids(content: str | tuple[int, ...] | tuple[Mapping[str, str], ...]) -> bool:
    return not isinstance(content, str) and bool(content) and isinstance(content[0], int)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns that follow one another: each is due `think_s` after the answer to the one before."""

    due_s: float
    """When its first turn is due, from the start of the run."""
    turns: tuple[Turn, ...]
    think_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """One run, in the order of time."""

    conversations: tuple[Conversation, ...]
    warmups: tuple[Turn, ...]
    """Sent before the clock starts, and counted nowhere."""
    scheduled: bool
    """False where all are due at once: then there is no schedule to be late for."""

    @property
    def num_requests(self) -> int:
        return sum(len(conversation.turns) for conversation in self.conversations)

    @property
    def offered_rate(self) -> float | None:
        """Conversations/s by the schedule; None without one."""
        span_s = max((conversation.due_s for conversation in self.conversations), default=0.0)
        return len(self.conversations) / span_s if self.scheduled and span_s > 0 else None
