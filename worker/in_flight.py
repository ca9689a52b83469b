"""Steps that were launched and not read yet, and the blocks that must not be reused until they have been.

A device writes into the blocks of a launched step until the step has ended. A sequence that leaves meanwhile hands its
blocks back through `InFlightSteps.release`, which keeps them until the last step that computes it was read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from baton.kvtransfer.blocks.manager import BlockManager
from baton.models.batch import Drawn, Launched
from baton.node.leg import LegKey
from baton.node.messages.control import PromptLogprobs
from baton.worker.parts import Grammars, Runner
from baton.worker.sequence import Sequence


class StepPart(NamedTuple):
    """`length` tokens of a sequence in a step, launched in the sequence's preemption epoch `epoch`."""

    sequence: Sequence
    length: int
    epoch: int
    first_scored: int = 0
    """Number of the first token of the prompt that gets its log probability; 0: none does."""
    most_drafts: int = 0
    """Drafts that the step may verify besides."""


@dataclass(slots=True)
class InFlightStep:
    """A launched step and the parts of sequences that it computes."""

    launched: Launched
    parts: list[StepPart]
    began_at: float
    behind: bool
    """Launched while another was in flight."""
    scored: bool = False
    """It has log probabilities of prompts."""
    masked: list[Sequence] = field(default_factory=list)
    """Sequences with masked draws, in the order of their rows, until their masks were given."""
    read_checksums: Callable[[], dict[int, bytes]] = dict
    """Called once, after the step was read: the checksums that were made with it, by block."""
    adapter_slots: frozenset[int] = frozenset()
    """Slots of adapters that it names."""
    kept_blocks: list[list[int]] = field(default_factory=list)
    """Blocks, tail first, of sequences that have left: released once the step was read."""

    def prompt_logprobs(self, live: Mapping[LegKey, Sequence]) -> Iterator[tuple[str, list[PromptLogprobs]]]:
        """Of a step that was read: links, and messages to them with log probabilities of prompts of live sequences."""
        if not self.scored:
            return
        for index, entries in self.launched.prompt_logprobs.items():
            part, sequence = self.parts[index], self.parts[index].sequence
            if live.get(sequence.leg) is sequence:
                yield sequence.link, sequence.score(part.first_scored, entries)


class InFlightSteps:
    """The launched steps of a runner, oldest first."""

    def __init__(self, runner: Runner, manager: BlockManager, clock: Callable[[], float]) -> None:
        self._runner = runner
        self._manager = manager
        self._clock = clock
        self._steps: deque[InFlightStep] = deque()

    def __len__(self) -> int:
        return len(self._steps)

    def launch(self, batch: Iterable[tuple[Sequence, int]]) -> InFlightStep:
        """Launch the next `length` tokens of each sequence, whose tables have blocks for them and for drafts."""
        rows, parts, masked, scored = [], [], [], False
        for sequence, length in batch:
            row = sequence.row(length)
            first_scored = row.start + row.targets.offset + 1 if row.targets is not None else 0
            rows.append(row)
            parts.append(StepPart(sequence, length, sequence.preemption_epoch, first_scored, row.most_drafts))
            scored |= first_scored > 0
            if row.draw is not None and row.draw.is_masked:
                masked.append(sequence)
        began_at = self._clock()
        step = InFlightStep(self._runner.launch(rows), parts, began_at, bool(self._steps), scored, masked)
        step.adapter_slots = frozenset(row.adapter for row in rows if row.adapter is not None)
        self._steps.append(step)
        for part, row in zip(parts, rows, strict=True):
            part.sequence.num_launched += part.length
            part.sequence.num_pending += row.draw is not None
            part.sequence.num_drafting += row.most_drafts
        return step

    @property
    def adapter_slots(self) -> set[int]:
        """Slots of adapters that a step which was not read yet may read."""
        return {slot for step in self._steps for slot in step.adapter_slots}

    @property
    def awaits_masks(self) -> bool:
        """The newest step needs masks before it can be read, and before another is launched."""
        return bool(self._steps) and bool(self._steps[-1].masked)

    def complete(self, grammars: Grammars) -> float:
        """Give the step its masks, if it awaits some and all steps before it were read. The seconds that this took."""
        if len(self._steps) != 1 or not self.awaits_masks:
            return 0.0
        began_at, step = self._clock(), self._steps[0]
        constraints = [each.constraint for each in step.masked if each.constraint is not None]
        assert len(constraints) == len(step.masked), "a sequence drew before its grammar was compiled"
        step.launched.complete(grammars.masks(constraints, step.launched.masked_drafts))
        step.masked.clear()
        return self._clock() - began_at

    def read(self) -> tuple[InFlightStep, list[Drawn | None]]:
        """Wait for the oldest step and return what it drew, one entry a part."""
        step = self._steps.popleft()
        drawn = step.launched.read()
        for blocks in step.kept_blocks:
            self._manager.release(blocks)
        for part in step.parts:
            part.sequence.num_drafting -= part.most_drafts
        return step, drawn

    def release(self, sequence: Sequence) -> None:
        """Give back the blocks of a sequence that computes no more: at once, or when its last step was read."""
        blocks = sequence.table.part_with()
        for step in reversed(self._steps):
            if any(part.sequence is sequence for part in step.parts):
                step.kept_blocks.append(blocks)
                return
        self._manager.release(blocks)
