"""A runner that draws tokens without computing, and says how long its steps take by the latency model.

It knows no network and no loop: `step_s` is what the host's clock has to add.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from baton.models.batch import DeviceTime, Drawn, Row
from baton.models.config import FULL_STEP_TOKENS
from baton.node.errors import InvariantBroken
from baton.node.messages.control import PromptLogprob
from baton.simulator.latency import Profile, RowWork
from baton.simulator.parallel import hand_over_s
from baton.worker.sequence import Sequence as WorkerSequence

VOCAB_SIZE = (1 << 31) - 1
"""A token id is the request's seed plus the number of tokens generated before."""
INSTANT_S = 1e-9
"""No step takes no time at all."""
MAX_AHEAD = 64
"""Steps that a worker is left alone for at most."""


@dataclass(frozen=True, slots=True)
class SimModel:
    """What the loop reads of a model's configuration."""

    vocab_size: int = VOCAB_SIZE
    full_step_tokens: int = FULL_STEP_TOKENS


@dataclass(frozen=True, slots=True)
class SimStep:
    """A launched step. Reading it waits for its end."""

    runner: SimRunner
    seconds: float
    """That it takes or, of several stages, at which it ends."""
    drawn: list[Drawn | None]
    device_time: DeviceTime | None = None
    prompt_logprobs: Mapping[int, tuple[PromptLogprob, ...]] = field(default_factory=dict)

    masked_drafts: Sequence[Sequence[int]] = ()

    def complete(self, masks: np.ndarray) -> None:
        raise InvariantBroken("simulated requests have no grammars")

    def read(self) -> list[Drawn | None]:
        self.runner.end(self.seconds)
        return self.drawn


class SimRunner:
    """A runner that samples without computing. `step_s` is the time of the steps read since `begin`.

    Each step is read before the next is launched: with no time between them, running ahead would make no difference.
    Of several stages each is at another step.
    """

    config = SimModel()

    def __init__(self, profile: Profile, stages: int, clock: Callable[[], float], adapter_s: float = 0.0) -> None:
        """adapter_s: that each adapter of a step takes."""
        self._adapter_s = adapter_s
        self.step_s = 0.0
        self.busy_s = 0.0
        self.run_ahead = stages - 1
        self._profile, self._stages, self._clock = profile, stages, clock
        self._ends_at = 0.0
        """When the last stage is at its end with the last step."""

    def begin(self) -> None:
        self.step_s = 0.0

    def launch(self, rows: Sequence[Row]) -> SimStep:
        seconds = max(INSTANT_S, self._profile.step_s([RowWork(row.start, row.num_new) for row in rows]))
        seconds += self._adapter_s * len({row.adapter for row in rows if row.adapter is not None})
        drawn = [_draw(row) for row in rows]
        if self._stages == 1:
            return SimStep(self, seconds, drawn)
        began_at, part_s = self._clock(), seconds / self._stages
        self.spend(part_s)  # of the first stage
        handed_s = hand_over_s(self._profile, sum(row.num_new for row in rows)) * (self._stages - 1)
        self._ends_at = max(began_at + seconds + handed_s, self._ends_at + part_s)
        return SimStep(self, self._ends_at, drawn)

    def end(self, seconds: float) -> None:
        """Wait for a step: of so many seconds or, of several stages, until then."""
        self.spend(seconds if self._stages == 1 else max(INSTANT_S, seconds - self._clock()))

    def spend(self, seconds: float) -> None:
        self.step_s += seconds
        self.busy_s += seconds

    def alike(self, running: Sequence[WorkerSequence]) -> list[float]:
        """Seconds of the next steps, while each draws one token of each of these, up to one with a last token."""
        batch, context = len(running), sum(each.num_tokens for each in running)
        left = min((each.sampling.max_tokens - each.num_generated for each in running), default=0)
        contexts = range(context, context + batch * min(left, MAX_AHEAD), batch) if batch else ()
        return [max(INSTANT_S, self._profile.decode.seconds(each, batch)) for each in contexts]

    def skip(self, steps: Sequence[float]) -> None:
        """Steps of these seconds were made without it."""
        self.busy_s = functools.reduce(operator.add, steps, self.busy_s)


def _draw(row: Row) -> Drawn | None:
    if row.draw is None:
        return None
    return Drawn((token_of(row.draw.sampling.seed, row.draw.num_generated),))


def token_of(seed: int, index: int) -> int:
    """The token that every worker samples as number `index` of the request with this seed."""
    return (seed + index) % VOCAB_SIZE
