"""The accepted tokens of one request, and the rule for the next: none is lost, duplicated or from a late attempt.

Pure. A token is accepted only if its attempt is current and its index is the next one; a message may repeat accepted
tokens (decode repeats the first one, in case prefill's own message was lost), and they must be the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.node.messages.control import Logprob, Tokens


class Gap(Exception):
    """Tokens are missing before these: the attempt cannot be trusted any more."""


@dataclass(slots=True)
class Ledger:
    """`prompt_ids` and the accepted tokens together are what a new attempt starts from."""

    prompt_ids: tuple[int, ...]
    attempt: int = 0
    accepted: list[int] = field(default_factory=list)
    finish: str = ""

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.accepted)

    def token_ids(self) -> tuple[int, ...]:
        return (*self.prompt_ids, *self.accepted)

    def next_attempt(self) -> int:
        self.attempt += 1
        return self.attempt

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
