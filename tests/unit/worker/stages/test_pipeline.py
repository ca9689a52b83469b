"""Steps through the stages of a worker: in order, several at once, drawn by the last one, never waited for in vain.

The stages run in threads here, with runners that compute nothing; models/cpu/test_stages.py compares tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch

from baton.models.batch import Draw, Drawn, Launched, Row
from baton.node.errors import PeerLost
from baton.node.messages.control import Grammar, Logprob, PromptLogprob, SamplingSpec
from baton.worker.stages.links import StageLink, stage_pair
from baton.worker.stages.messages import StepDrawn, decode_drawn, decode_masks, decode_rows, encode_drawn, residual_of
from baton.worker.stages.runner import PipelineRunner
from baton.worker.stages.work import Entering, work

COUNT = 3
SCORES = {0: (PromptLogprob(-0.5, 2, ((7, -0.25),)),)}


class Adding:
    """A stage that adds one to the residual, and the last one draws what is in it."""

    config, dtype = None, torch.bfloat16

    def __init__(self) -> None:
        self.may_go = threading.Semaphore(0)
        self.masks: list[np.ndarray] = []

    def advance(self, rows: Sequence[Row], entering: torch.Tensor | None = None) -> torch.Tensor:
        if entering is None:
            return torch.tensor([[float(token)] * 4 for row in rows for token in row.token_ids], dtype=self.dtype)
        self.may_go.acquire(timeout=60)
        return entering + 1

    def launch(self, rows: Sequence[Row], entering: torch.Tensor) -> Launched:
        ends = np.cumsum([len(row.token_ids) for row in rows]) - 1
        logprobs = (Logprob(-1.0, ()),)
        tokens = [int(entering[end, 0]) for end in ends]
        drawn = [Drawn((token,), logprobs) if row.draw else None for token, row in zip(tokens, rows, strict=True)]
        return Masked(self, drawn)


class Masked:
    """A step of the last stage, which keeps its masks."""

    device_time = None
    prompt_logprobs = SCORES

    def __init__(self, stage: Adding, drawn: list[Drawn | None]) -> None:
        self._stage, self._drawn = stage, drawn

    def complete(self, masks: np.ndarray) -> None:
        self._stage.masks.append(masks)

    def read(self) -> list[Drawn | None]:
        return self._drawn


class Rig:
    def __init__(self) -> None:
        links = [stage_pair(index, (index + 1) % COUNT) for index in range(COUNT)]
        self.links: list[StageLink] = [link for both in links for link in both]
        self.middle, self.last = Adding(), Adding()
        self.runner = PipelineRunner(Adding(), COUNT, links[0][0], links[-1][1])  # type: ignore[arg-type]
        self.threads = [
            threading.Thread(target=self._work, args=(stage, links[index - 1][1], links[index][0], index == COUNT - 1))
            for index, stage in enumerate((self.middle, self.last), start=1)
        ]
        for thread in self.threads:
            thread.start()

    def _work(self, stage: Adding, entering: StageLink, leaving: StageLink, is_last: bool) -> None:
        with pytest.raises(PeerLost):
            work(stage, Entering(entering, COUNT), leaving, is_last)
        for link in (entering, leaving):  # as the end of its process does
            link.shut()

    def close(self) -> None:
        for link in self.links:
            link.shut()
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


def chunk(*tokens: int, draws: bool = True, grammar: Grammar | None = None) -> Row:
    sampling = SamplingSpec(max_tokens=1, grammar=grammar)
    return Row(tokens, 0, (1, 2), Draw(sampling, tokens, len(tokens), 0) if draws else None)


def test_several_steps_are_in_flight_and_end_in_order(rig):
    """Guards against a pipeline in which one stage computes at a time, and answers that go to other steps."""
    assert rig.runner.run_ahead == COUNT - 1
    steps = [rig.runner.launch([chunk(10 * number, 10 * number + 1)]) for number in range(COUNT)]
    for _ in steps:
        rig.middle.may_go.release()  # the first stage did not wait for it
    assert [[drawn.token_ids for drawn in step.read()] for step in steps] == [[(2,)], [(12,)], [(22,)]]
    assert steps[0].prompt_logprobs == SCORES


def test_chunks_without_a_draw_and_what_comes_with_one(rig):
    """Guards against log probabilities that stay in the last stage."""
    rig.middle.may_go.release()
    step = rig.runner.launch([chunk(5, draws=False), chunk(1, 2, 3)])
    assert step.read() == [None, Drawn((4,), (Logprob(-1.0, ()),))]


def test_masks_get_to_the_stage_that_draws(rig):
    """Guards against a first token that a grammar forbids, and a stage that waits for masks that nothing sends."""
    rig.middle.may_go.release()
    step = rig.runner.launch([chunk(5, grammar=Grammar(text="start: x", end_ids=(1,)))])
    masks = np.array([[-1, 6], [0, 3]], dtype=np.int32)[:1]
    step.complete(masks)
    assert step.read()[0].token_ids == (6,)
    assert np.array_equal(rig.last.masks[0], masks)


def test_the_loss_of_a_stage_ends_what_waits_for_it(rig):
    """Guards against a worker that waits for ever for a stage that was killed with steps in flight."""
    step = rig.runner.launch([chunk(5)])
    rig.links[2].shut()  # between the middle and the last stage
    rig.middle.may_go.release()
    with pytest.raises(PeerLost, match="stage 2 has ended"):
        step.read()


@pytest.mark.parametrize(
    "read",
    [
        lambda: decode_rows(b"\xc1"),
        lambda: residual_of(bytearray(6), torch.float32, 2),
        lambda: residual_of(bytearray(), torch.float32, 1),
        lambda: decode_masks(b"\x02", bytearray(12)),
        lambda: decode_masks(b"\xa1", bytearray(4)),
        lambda: decode_drawn(b"\x90", 1),
        lambda: decode_drawn(encode_drawn(StepDrawn([None], {})), 2),
        lambda: decode_drawn(encode_drawn(StepDrawn([None], SCORES | {1: ()})), 1),
    ],
)
def test_what_is_no_message_of_a_stage_is_its_loss(read):
    """Guards against a stage that ends by an error of a library, and answers that go to other rows."""
    with pytest.raises(PeerLost, match="a stage"):
        read()


def test_a_wait_has_an_end():
    """Guards against a stage that neither ends nor answers, and a message of which a part never comes."""
    one, other = stage_pair(0, 1)
    with pytest.raises(PeerLost, match=r"stage 1 has not answered for 0\.01 s"):
        one.receive(0.01)
    record = encode_drawn(StepDrawn([None], {}))
    other.send(record, b"data")
    assert one.receive(1.0) == (record, bytearray(b"data"))
    other.close()
    with pytest.raises(PeerLost, match="stage 1 has ended"):
        one.receive(1.0)
    with pytest.raises(PeerLost, match="stage 1 has ended"):
        one.send(b"record")
