"""Stages of a pipeline on GPUs compute what one GPU computes: kernels are interpreted, and run as late as can be."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.models.batch import Draw, PromptTargets, Row
from baton.models.config import ModelConfig
from baton.models.cuda import chunk_forward, prefill_pieces
from baton.models.cuda.limits import StepLimits
from baton.models.cuda.products import Policy, fastest
from baton.models.cuda.queue import Work
from baton.models.cuda.residuals import EnteringResiduals
from baton.models.cuda.runner import CudaRunner
from baton.models.cuda.stage import AdvancingStage
from baton.models.kv_format import KvFormat
from baton.models.partition import WHOLE, Stage, part_of
from baton.models.weights import load_weights
from baton.node.errors import InvariantBroken
from baton.node.messages.control import SamplingSpec
from baton.testing.late_queue import LateQueue
from baton.tests.unit.models.conftest import LATENT
from baton.tests.unit.models.cuda.ahead import GRAMMAR, mask_after
from baton.tests.unit.models.cuda.test_ranks import split

BLOCK, NUM_BLOCKS, LONGEST = 16, 12, 64
SMALL = {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
}
SPECS = [
    SamplingSpec(max_tokens=9, temperature=0.0),
    SamplingSpec(max_tokens=9, temperature=0.9, seed=6, top_p=0.9, repetition_penalty=1.5),
    SamplingSpec(max_tokens=9, temperature=0.8, seed=5, grammar=GRAMMAR),
]
LENGTH, CUTS = 13, (7, 8, 3)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreter takes its time for each token, padding included."""
    monkeypatch.setattr(prefill_pieces, "SMALLEST", (8, 16))


class LazyQueue(LateQueue):
    """Runs no work when it is captured, which would take an interpreter long."""

    def capture(self, work: Work) -> Work:
        return work


class Stages:
    """A pipeline, each stage over its own queue and pool; of one stage, a runner."""

    def __init__(
        self,
        folder: Path,
        count: int,
        *,
        policy: Policy = fastest,
        max_tokens: int = 64,
        max_rows: int = 3,
        kv_format: KvFormat | None = None,
    ) -> None:
        self.config = ModelConfig.from_folder(folder)
        limits = StepLimits(max_rows, max_tokens, run_ahead=2)
        self.pools: list[torch.Tensor] = []
        self.before: list[AdvancingStage] = []
        for stage in (Stage(index, count) for index in range(count)):
            weights = load_weights(self.config, folder, torch.float32, pack=False, stage=stage)
            own = part_of(self.config, WHOLE, stage)
            shape = (NUM_BLOCKS, own.num_kv_heads, own.num_layers, own.kv_planes, BLOCK, own.head_dim)
            self.pools.append(torch.zeros(shape))
            given = self.config, weights, LazyQueue(), limits, LONGEST
            if stage.is_last:
                self.last = CudaRunner(*given, policy, kv_format, stage=stage)
                self.last.bind_pool(self.pools[-1], LONGEST)
            else:
                self.before.append(AdvancingStage(*given, stage, policy, kv_format))
                self.before[-1].bind_pool(self.pools[-1], LONGEST)

    def launch(self, steps: Sequence[Sequence[Row]]) -> list:
        """Each stage launches all of them before the next one has any."""
        entering: list = [None] * len(steps)
        for stage in self.before:
            lefts = [stage.advance(rows, entered) for rows, entered in zip(steps, entering, strict=True)]
            entering = [left.wait() for left in lefts]
        return [self.last.launch(rows, entered) for rows, entered in zip(steps, entering, strict=True)]


def serve(stages: Stages) -> list:
    """Three prompts in two steps each, of which one continues beside the begin of another; what is drawn, and the
    scores of one."""
    generator = torch.Generator().manual_seed(4)
    prompts = torch.randint(2, stages.config.vocab_size, (3, LENGTH), generator=generator).tolist()
    begins = [
        Row(prompt[:cut], 0, range(4 * slot, 4 * slot + 4), None, slot)
        for slot, (prompt, cut) in enumerate(zip(prompts, CUTS, strict=True))
    ]
    ends = [
        Row(prompt[cut:], cut, begun.blocks, Draw(spec, prompt, len(prompt), 0), slot)
        for slot, (prompt, cut, begun, spec) in enumerate(zip(prompts, CUTS, begins, SPECS, strict=True))
    ]
    targets = PromptTargets(0, prompts[0][CUTS[0] + 1 :], 2)
    plain = stages.launch([begins[:2], [ends[1], begins[2]], [ends[0]._replace(targets=targets)]])
    found = [step.read() for step in plain]
    (masked,) = stages.launch([ends[2:]])
    masked.complete(np.stack([mask_after(prompts[2], stages.config.vocab_size)]))
    ranks = [(each.rank, [token for token, _ in each.top]) for each in plain[2].prompt_logprobs[0]]
    return [[drawn and drawn.token_ids for step in (*found, masked.read()) for drawn in step], ranks]


@pytest.mark.parametrize(
    ("family", "fields", "count"),
    [
        ("llama", {"num_hidden_layers": 3}, 3),
        ("gemma3", {"sliding_window": 5, "num_hidden_layers": 3, "sliding_window_pattern": 2}, 2),
        (
            "qwen2_moe",
            {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [1]},
            2,
        ),
        (
            "deepseek_v3",
            LATENT | {"num_attention_heads": 4, "v_head_dim": 16, "q_lora_rank": 32, "moe_intermediate_size": 32},
            2,
        ),
    ],
)
def test_stages_compute_what_one_gpu_computes(make_model, family, fields, count):
    """Guards against layers of another stage, windows counted from a stage's first layer, a residual without what the
    last layer adds, of a step before or of another stage's layout, logits in a stage that draws nothing, and tokens
    that a stage leaves out since they are not drawn. Bit for bit, as the order of operations is the same."""
    folder = make_model(family, **SMALL | fields).folder
    one, several = (Stages(folder, stages, policy=split) for stages in (1, count))
    assert serve(several) == serve(one)
    assert torch.equal(torch.cat(several.pools, 2), one.pools[0])


@pytest.mark.parametrize(("max_tokens", "max_rows"), [(15, 3), (16, 4)], ids=["op by op", "captured"])
def test_steps_that_are_not_in_pieces_enter_and_leave_stages(make_model, monkeypatch, max_tokens, max_rows):
    """Guards against a stage that does not end, or is not entered, where its steps run op by op or are one launch."""
    monkeypatch.setattr(chunk_forward, "CHUNK_SIZES", ((16, 1),))
    folder = make_model("llama", **SMALL).folder
    one, several = (Stages(folder, stages, max_tokens=max_tokens, max_rows=max_rows) for stages in (1, 2))
    assert serve(several) == serve(one)
    assert torch.equal(torch.cat(several.pools, 2), one.pools[0])


def test_padding_enters_a_stage_as_zeros():
    """Guards against rows to which the layers add from step to step, and tokens of a step that is launched behind."""
    queue, residual = LateQueue(), torch.ones(8, 4)
    entering = EnteringResiduals(residual, Stage(1, 2))
    for value in (2.0, 3.0):
        enter = entering.of(torch.full((3, 4), value), 3)
        queue.enqueue(partial(enter, 6))
    queue.mark().wait()
    assert residual[:, 0].tolist() == [3.0] * 3 + [0.0] * 3 + [1.0] * 2


def test_a_stage_refuses_what_does_not_enter_it(make_model):
    """Guards against steps over what another step left."""
    stages = Stages(make_model("llama", **SMALL).folder, 2)
    row = Row([1, 2], 0, [0], None)
    for entering in (None, torch.zeros(3, 32), torch.zeros(2, 16)):
        with pytest.raises(InvariantBroken, match="2 tokens enter a stage with"):
            stages.last.launch([row], entering)


def test_a_stage_has_the_scales_of_its_layers():
    """Guards against static scales of another stage's layers, or of another rank's heads."""
    scales = torch.arange(24.0).view(4, 2, 3)
    part = KvFormat.fp8(scales).part(range(1, 3), range(1, 3))
    assert part.quantised and torch.equal(part.static, scales[1:3, :, 1:])
    assert KvFormat.plain(torch.float32).part(range(1, 3), range(1, 3)).static is None
