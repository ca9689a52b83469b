"""Steps with adapters, on CPU tensors and run as late as can be: against a model with the adapter in its weights."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.models.adapters.adapter import Adapter, LayerAdapter, LowRank
from baton.models.batch import Draw, Row
from baton.models.config import ModelConfig
from baton.models.cuda.limits import StepLimits
from baton.models.cuda.products import fastest, invariant
from baton.models.cuda.runner import CudaRunner
from baton.models.weights import load_weights
from baton.node.errors import AdapterError
from baton.node.messages.control import SamplingSpec
from baton.testing.late_queue import LateQueue
from baton.tests.unit.models.cuda.ahead import Ahead, one_after_the_other
from baton.tests.unit.models.cuda.merged import merged_runner, random_adapter
from baton.tests.unit.models.cuda.test_runner import split_in_two

BLOCK = 16
PROMPTS = {0: [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3], 1: [2, 7], 2: [10, 20, 30, 40, 50]}
TABLES = {0: [4, 11, 2], 1: [7, 0], 2: [9, 3, 5]}
NAMED = {0: 1, 2: 0}
"""Adapters of the sequences; the other has none."""


class Served:
    """A runner with adapters in its slots, and the CPU's with each in its weights."""

    def __init__(self, folder, policy=fastest, **limits) -> None:
        self.config = ModelConfig.from_folder(folder)
        weights = load_weights(self.config, folder, torch.float32, pack=False)
        step_limits = StepLimits(3, 64, **{"adapter_slots": 2, "max_rank": 32, **limits})
        self.late = CudaRunner(self.config, weights, LateQueue(), step_limits, 512, policy)
        adapters = [random_adapter(self.config, [20], 1), random_adapter(self.config, [8, 3], 2, without=["down"])]
        for slot, adapter in enumerate(adapters):
            assert self.late.adapters.fill(slot, self.late.adapters.prepare(adapter)).done
        plain = merged_runner(self.config, weights, None, BLOCK)
        self.late.bind_pool(torch.zeros(plain.kv_shape(24, BLOCK)), 96)
        self.by_adapter = {None: plain} | {
            slot: merged_runner(self.config, weights, adapter, BLOCK) for slot, adapter in enumerate(adapters)
        }

    def expected(self, slot: int, count: int) -> list[int]:
        """Tokens of a sequence alone."""
        return one_after_the_other(self.by_adapter[NAMED.get(slot)], PROMPTS[slot], TABLES[slot], count)


def test_logits_of_mixed_prompts_equal_those_of_merged_weights(make_model):
    """Guards every product's part of a slot, other ranks in one product, parts that are left alone, and the rows that
    are left behind the last layer's attention. The family has a gate of its own and one head of keys."""
    served = Served(make_model("gemma2", num_hidden_layers=2).folder)
    draw = Draw(SamplingSpec(max_tokens=9, temperature=0.0), (), 0, 0)
    rows = [Row(PROMPTS[slot], 0, TABLES[slot], draw, slot, adapter=NAMED.get(slot)) for slot in PROMPTS]
    found = served.late.logits(rows)
    for slot, row in enumerate(rows):
        exact = served.by_adapter[row.adapter].compute([row._replace(adapter=None)])[1]
        torch.testing.assert_close(found[slot : slot + 1], exact, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("policy", "run_ahead", "mixed_tokens", "most_drafts"),
    [(split_in_two, 1, 1, 0), (invariant, 0, 64, 0), (fastest, 1, 64, 2)],
    ids=["split one pass", "deterministic two launches", "drafts"],
)
def test_tokens_of_mixed_batches_equal_those_alone(make_model, policy, run_ahead, mixed_tokens, most_drafts):
    """Guards grouping on the device, captured steps, and a slot of sequences that another takes over."""
    limits = {"run_ahead": run_ahead, "mixed_tokens": mixed_tokens, "most_drafts": most_drafts}
    folder = make_model("llama", num_hidden_layers=2, vocab_size=160).folder
    served = Served(folder, policy, **limits)
    run = Ahead(served.late, most_drafts)
    for slot, prompt in PROMPTS.items():
        run.adapters = NAMED
        run.start(slot, prompt, TABLES[slot])
        while run.computed[slot] < len(prompt):
            run.launch([*range(slot), slot], 9)
    for _ in range(6):
        run.launch(list(PROMPTS))
    for slot in PROMPTS:
        assert run.generated(slot)[:6] == served.expected(slot, 6), slot
    # The sequence's slot now has one without an adapter.
    run.adapters = {}
    run.start(0, PROMPTS[1], TABLES[0])
    for _ in range(4):
        run.launch([0])
    assert run.generated(0)[:3] == one_after_the_other(served.by_adapter[None], PROMPTS[1], TABLES[0], 3)


def test_adapters_that_no_kernel_runs_are_refused(make_model):
    """Guards against an adapter of which a part is left out."""
    served = Served(make_model("llama", num_hidden_layers=1).folder)
    prepare, layers = served.late.adapters.prepare, (LayerAdapter(),)
    pair = LowRank(torch.zeros(4, 64), torch.zeros(64, 4))
    with pytest.raises(AdapterError, match="head"):
        prepare(Adapter(b"", layers, lm_head=(pair,)))
    with pytest.raises(AdapterError, match="rank 48, more than --max-lora-rank 32"):
        prepare(random_adapter(served.config, [48], 1))
    broken = random_adapter(served.config, [4], 1)
    broken.layers[0].o[0].b[0, 0] = float("inf")
    with pytest.raises(AdapterError, match="not finite"):
        prepare(broken)
