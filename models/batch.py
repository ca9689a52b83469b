"""What a step is made of and what it gives back, in plain values: rows in, drawn tokens out. No torch.

A step is launched first and read later. As many as a runner's `run_ahead` may be launched before the first of them is
read; the worker then does not know the token that a sequence continues with, and says so by a row without token ids.
What a grammar allows depends on that token too: a step with masked draws computes its logits when it is launched, and
draws when it is completed, which is after the step before it was read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import numpy as np

from baton.node.errors import InvariantBroken
from baton.node.messages.control import Logprob, PromptLogprob, SamplingSpec

DraftSource = Literal["history", "prediction", "answers", "eagle", "grammar"]
"""Where drafts come from: the sequence itself, what the client predicts, past answers, a model beside the model, a
grammar that allows no other tokens."""


class Draw(NamedTuple):
    """How the next token of a row is drawn. It becomes token number `start + len(token_ids)` of its sequence."""

    sampling: SamplingSpec
    history: Sequence[int]
    """All known tokens of the sequence, prompt and generated; read for penalties and bad words, else may be empty."""
    prompt_len: int
    """The first so many of `history` are prompt."""
    num_generated: int
    """Tokens generated before this one; at least so many, while drafts are in flight."""
    prediction: Sequence[int] = ()
    """Tokens of which the client says that they may follow the prompt."""
    past_answers: Sequence[int] = ()
    """Tokens that followed similar prompts."""
    forced: Sequence[int] = ()
    """Tokens behind `history` of which each is the only one that a grammar allows in its place."""

    @property
    def is_masked(self) -> bool:
        """The tokens that may be drawn are named later, by `Launched.complete`."""
        return self.sampling.grammar is not None


class PromptTargets(NamedTuple):
    """Tokens of the prompt whose log probabilities a row computes."""

    offset: int
    """They follow the row's tokens from number `offset` on, one each."""
    token_ids: Sequence[int]
    num_top: int
    """Most likely tokens to name beside each."""


class Row(NamedTuple):
    """One sequence's part in a step: a chunk of its prompt, or its last token."""

    token_ids: Sequence[int]
    """Tokens to compute now. Empty: the token that this slot drew last, which the host has not read yet."""
    start: int
    """Tokens before them, whose KV is in the pool; of a row without token ids while drafts are in flight, at least so
    many: the device knows how many were accepted."""
    blocks: Sequence[int]
    """Block ids in the order of the sequence; they cover the tokens and the drafts of this step and of those in flight,
    and may be more."""
    draw: Draw | None
    """None where no token follows yet: a chunk that does not reach the last known token."""
    slot: int = 0
    """Where a device keeps what the sequence needs from step to step; its own as long as it runs. The CPU keeps none.
    """
    targets: PromptTargets | None = None
    most_drafts: int = 0
    """Drafts that the step may verify behind the one token of a row that draws; see models.drafts."""
    adapter: int | None = None
    """The runner's slot (models.adapters.slots) of the adapter that all its tokens are computed with; None: the model
    alone."""
    following: int | None = None
    """The known token behind those of a chunk that does not reach the last one."""

    @property
    def num_new(self) -> int:
        """Tokens that the step computes."""
        return len(self.token_ids) or 1


class Drawn(NamedTuple):
    """The tokens that follow a row, in order: the drafts that were accepted, and the one drawn behind them. None at all
    of a row that was launched behind the last token that its sequence may have."""

    token_ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...] = ()
    """One a token where the row's SamplingSpec asks for them, else empty."""
    num_drafts: int = 0
    """Drafts that were verified."""
    source: DraftSource = "history"
    """Where they came from."""


@dataclass(frozen=True, slots=True)
class DeviceTime:
    """What a step took on a device that works beside the host."""

    busy_s: float
    """From its first operation to its last."""
    gap_s: float
    """From the end of the step before it to its begin: the device had nothing to do. 0 for the first."""
    mask_wait_s: float = 0.0
    """The part of `busy_s` in which its logits waited for masks."""


class Launched(Protocol):
    """A step that was launched. One with masked draws is open until `complete` was called: all steps before it are read
    until then, and none is launched behind it."""

    @property
    def masked_drafts(self) -> Sequence[Sequence[int]]:
        """The drafts of each masked row, of which the step may verify the first ones only; empty: of none. Of an open
        step, once all steps before it were read."""
        ...

    def complete(self, masks: np.ndarray) -> None:
        """The tokens that masked rows may draw, and may draw behind each of their `masked_drafts`, row by row: int32
        [rows and drafts, ceil(vocabulary / 32)], where token v is bit v % 32 of word v // 32."""
        ...

    def read(self) -> list[Drawn | None]:
        """One entry a row; waits until the step has ended. Once, and in the order of the launches."""
        ...

    @property
    def device_time(self) -> DeviceTime | None:
        """Of a step that was read; None where the host computes itself."""
        ...

    @property
    def prompt_logprobs(self) -> Mapping[int, tuple[PromptLogprob, ...]]:
        """Of a step that was read: what rows with targets asked for, by the number of the row."""
        ...


@dataclass(frozen=True, slots=True)
class Done:
    """A step that has ended already."""

    drawn: list[Drawn | None]
    device_time: DeviceTime | None = None
    prompt_logprobs: Mapping[int, tuple[PromptLogprob, ...]] = field(default_factory=dict)
    masked_drafts: Sequence[Sequence[int]] = ()

    def complete(self, masks: np.ndarray) -> None:
        raise InvariantBroken("the step has ended already")

    def read(self) -> list[Drawn | None]:
        return self.drawn
