"""The first stage as the worker's runner: it computes its layers of a step, passes it on, and reads later what the last
stage has drawn. As many steps are in flight as there are stages, each stage at another one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch

from baton.models.batch import Done, Drawn, Launched, Row
from baton.models.config import ModelConfig
from baton.node.errors import InvariantBroken
from baton.node.messages.control import PromptLogprob
from baton.worker.stages.links import StepLink
from baton.worker.stages.messages import bytes_of, decode_drawn, encode_masks, encode_rows

STEP_S = 600.0
"""A stage has so long for the steps in flight. That one is frozen is noticed earlier (ranks.members)."""


class FirstStage(Protocol):
    """models.cpu.runner.ModelRunner of the first stage."""

    @property
    def config(self) -> ModelConfig: ...

    def advance(self, rows: Sequence[Row]) -> torch.Tensor: ...


class PipelineRunner:
    """worker.parts.Runner over the stages. One thread makes all calls."""

    def __init__(self, first: FirstStage, count: int, following: StepLink, last: StepLink) -> None:
        """count: of the stages; following: to the second one, last: to the last one."""
        self.config = first.config
        self.run_ahead = count - 1
        self._first, self._following, self._last = first, following, last

    def launch(self, rows: Sequence[Row]) -> Launched:
        """Returns when this stage has computed its part."""
        if not rows:
            return Done([])
        self._following.send(encode_rows(rows), bytes_of(self._first.advance(rows)))
        return PipelinedStep(self._last, len(rows))


class PipelinedStep:
    """models.batch.Launched: a step that the last stage ends. Steps are read in the order of their launches."""

    device_time = None
    masked_drafts: Sequence[Sequence[int]] = ()  # no step in stages has drafts

    def __init__(self, last: StepLink, num_rows: int) -> None:
        self._last, self._num_rows = last, num_rows
        self._scores: Mapping[int, tuple[PromptLogprob, ...]] | None = None

    def complete(self, masks: np.ndarray) -> None:
        self._last.send(*encode_masks(masks))

    def read(self) -> list[Drawn | None]:
        record, _ = self._last.receive(STEP_S)
        step = decode_drawn(record, self._num_rows)
        self._scores = step.prompt_logprobs
        return step.drawn

    @property
    def prompt_logprobs(self) -> Mapping[int, tuple[PromptLogprob, ...]]:
        if self._scores is None:
            raise InvariantBroken("a step's log probabilities are asked for before it was read")
        return self._scores
