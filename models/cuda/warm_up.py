"""The steps that a runner on a GPU runs before its first request, so that no request waits for a compiler."""

from __future__ import annotations

from collections.abc import Iterator

from baton.models.batch import Draw, PromptTargets, Row
from baton.models.cuda.limits import StepLimits
from baton.models.cuda.products import TABLED_ROWS
from baton.models.sampling_rules import EVERYTHING
from baton.node.messages.control import SamplingSpec


def warm_up_steps(limits: StepLimits, longest: int, block_tokens: int) -> Iterator[list[Row]]:
    """Parts of prompts of every size that has kernels of its own, with adapters and targets too. They write the pool's
    first blocks, of sequences of up to `longest` tokens."""
    blocks = range(-(-longest // block_tokens))
    draw = Draw(SamplingSpec(max_tokens=1, temperature=0.0), (), 1, 0)
    length = min(longest - 1, limits.max_tokens)
    yield [Row([0], 1, blocks, Draw(EVERYTHING, (0, 0), 1, 1))]
    for adapter in (None, 0) if limits.adapter_slots else (None,):  # a slot that was never filled adds nothing
        for size in TABLED_ROWS:
            slots = range(min(size, limits.max_rows))
            yield [Row([0], 0, [0], draw, slot, adapter=adapter) for slot in slots]
        yield [Row([0] * length, 0, blocks, draw, adapter=adapter)]
    if length > 1:
        yield [Row([0] * length, 0, blocks, draw, 0, PromptTargets(0, [0] * (length - 1), 1))]
