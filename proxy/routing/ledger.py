"""The accepted tokens of one request, and the rule for the next: none is lost, duplicated or from a late attempt.

Pure. A token is accepted only if its attempt is current and its index is the next one; a message may repeat accepted
tokens (decode repeats the first one, in case prefill's own message was lost), and they must be the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.node.messages.control import Logprob, PromptLogprob, PromptLogprobs, Tokens


class Gap(Exception):
    """Tokens are missing before these: the attempt cannot be trusted any more."""


@dataclass(slots=True)
class Ledger:
    """`prompt_ids` and the accepted tokens together are what a new attempt starts from."""

    prompt_ids: tuple[int, ...]
    attempt: int = 0
    accepted: list[int] = field(default_factory=list)
    finish: str = ""
    num_scored: int = 0
    """The first `num_scored` tokens of the prompt have their log probabilities, or need none."""

    @property
    def awaits_prompt(self) -> bool:
        """Log probabilities of the prompt are to come, before any token."""
        return self.num_scored < len(self.prompt_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.accepted)

    def token_ids(self) -> tuple[int, ...]:
        return (*self.prompt_ids, *self.accepted)

    def next_attempt(self) -> int:
        self.attempt += 1
        return self.attempt

    def accept_prompt(self, message: PromptLogprobs) -> tuple[PromptLogprob, ...]:
        """The new entries in `message`; empty for a late or repeated one. Raises Gap."""
        if message.attempt != self.attempt or self.finish:
            return ()
        known = self.num_scored - message.first
        if known < 0:
            raise Gap(f"log probabilities from prompt token {message.first} on came, {self.num_scored} is next")
        new = message.entries[known : known + len(self.prompt_ids) - self.num_scored]
        self.num_scored += len(new)
        return new

    def accept(self, message: Tokens) -> tuple[tuple[int, ...], tuple[Logprob, ...]]:
        """The new tokens in `message`, with their logprobs; empty for a late or repeated message. Raises Gap."""
        if message.attempt != self.attempt or self.finish:
            return (), ()
        known = len(self.accepted) - message.index
        if known < 0:
            raise Gap(f"token {message.index} came, {len(self.accepted)} is next")
        repeated = message.ids[:known]
        if tuple(self.accepted[message.index : message.index + len(repeated)]) != repeated:
            raise Gap(f"token {message.index} differs from the one accepted before")
        new = message.ids[known:]
        if not new and not message.finish:
            return (), ()
        self.accepted += new
        self.finish = message.finish
        return new, message.logprobs[known:]
