"""Stages on GPUs compute what one GPU computes, in one process and as processes of a prefill worker.

With one GPU all stages are on it. Run it in a separate process, as tests/gpu/test_runner.py says.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.benchmark.cluster.completions import random_ids
from baton.benchmark.cluster.running import metrics, running
from baton.launch.local import ServeSettings
from baton.models.batch import Draw, PromptTargets, Row
from baton.models.config import ModelConfig
from baton.models.cpu.runner import ModelRunner
from baton.models.cuda.limits import StepLimits
from baton.models.cuda.queue import CudaQueue
from baton.models.cuda.runner import CudaRunner
from baton.models.cuda.stage import AdvancingStage
from baton.models.partition import WHOLE, Stage, part_of
from baton.models.weights import load_weights
from baton.node.messages.control import SamplingSpec
from baton.node.modelhub import locate_model
from baton.tests.gpu.test_runner import LONGEST, prompts, table
from baton.tests.unit.models.cuda.ahead import one_after_the_other

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]
NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0

MAX_ROWS, STEP_TOKENS, BLOCK, IN_FLIGHT = 16, 2304, 64, 3
SPECS = [
    SamplingSpec(max_tokens=9, temperature=0.0),
    SamplingSpec(max_tokens=9, temperature=0.8, seed=5),
    SamplingSpec(max_tokens=9, temperature=0.9, seed=6, top_p=0.9, repetition_penalty=1.5),
]


class Stages:
    """A pipeline in one process, with calls as it has links: each stage launches its steps before it waits for any."""

    def __init__(self, count: int) -> None:
        folder = locate_model("demo")
        self.config = ModelConfig.from_folder(folder)
        limits = StepLimits(MAX_ROWS, STEP_TOKENS, run_ahead=IN_FLIGHT - 1)
        self.pools: list[torch.Tensor] = []
        self.before: list[AdvancingStage] = []
        for stage in (Stage(index, count) for index in range(count)):
            gpu = stage.index % NUM_GPUS
            torch.cuda.set_device(gpu)
            weights = load_weights(self.config, folder, torch.float32, f"cuda:{gpu}", pack=False, stage=stage)
            own = part_of(self.config, WHOLE, stage)
            shape = (MAX_ROWS * -(-LONGEST // BLOCK) + 1, own.num_kv_heads, own.num_layers, 2, BLOCK, own.head_dim)
            self.pools.append(torch.zeros(shape, device=f"cuda:{gpu}"))
            given = self.config, weights, CudaQueue(gpu), limits, LONGEST
            made: CudaRunner | AdvancingStage
            if stage.is_last:
                made = self.last = CudaRunner(*given, stage=stage)
            else:
                made = AdvancingStage(*given, stage)
                self.before.append(made)
            made.bind_pool(self.pools[-1], LONGEST)
            made.warm_up()
            self.pools[-1].zero_()  # what warmed up has written
            torch.cuda.synchronize(gpu)

    def launch(self, steps: Sequence[Sequence[Row]]) -> list:
        """As many as may be in flight."""
        entering: list = [None] * len(steps)
        for stage in self.before:
            lefts = [stage.advance(rows, entered) for rows, entered in zip(steps, entering, strict=True)]
            entering = [left.wait() for left in lefts]
        return [self.last.launch(rows, entered) for rows, entered in zip(steps, entering, strict=True)]


def steps() -> Iterator[list[Row]]:
    """Of sizes that are captured, in pieces, and op by op: the begins of prompts, then their ends with draws."""
    made = prompts(MAX_ROWS)
    cuts = [len(prompt) // 3 for prompt in made]
    begins = [
        Row(prompt[:cut], 0, table(slot), None, slot)
        for slot, (prompt, cut) in enumerate(zip(made, cuts, strict=True))
        if cut
    ]
    ends = []
    for slot, (prompt, cut) in enumerate(zip(made, cuts, strict=True)):
        draw = Draw(SPECS[slot % len(SPECS)], prompt, len(prompt), 0)
        targets = PromptTargets(0, prompt[cut + 1 :], 2) if slot == 7 and len(prompt) - cut > 1 else None
        ends.append(Row(prompt[cut:], cut, table(slot), draw, slot, targets))
    for first in range(0, len(begins), 4):
        yield begins[first : first + 4]
    for size, first in ((1, 0), (1, 1), (2, 2), (4, 4), (8, 8)):
        yield ends[first : first + size]
    yield [row._replace(token_ids=made[row.slot], start=0, targets=None) for row in ends]


def serve(stages: Stages) -> list:
    found, all_steps = [], list(steps())
    for first in range(0, len(all_steps), IN_FLIGHT):
        for launched in stages.launch(all_steps[first : first + IN_FLIGHT]):
            tokens = [drawn and drawn.token_ids for drawn in launched.read()]
            ranks = {row: [each.rank for each in own] for row, own in launched.prompt_logprobs.items()}
            found.append((tokens, ranks))
    return found


@pytest.mark.parametrize("count", [2, 3])
def test_stages_draw_what_one_gpu_draws(count):
    """Guards copies that are read or overwritten too early, captured steps that end without their last sum, and padding
    that spoils other tokens."""
    one, several = Stages(1), Stages(count)
    expected = serve(one)
    for _ in range(3):
        assert serve(several) == expected
    found = torch.cat([pool.cpu() for pool in several.pools], 2)
    torch.testing.assert_close(found, one.pools[0].cpu(), rtol=1e-3, atol=1e-3)


MAX_TOKENS, PREFILL, END_S = 24, "prefill-0", 30.0
WORKER = ("--dtype=float32", "--max-num-seqs=16", "--num-blocks=300", "--max-model-len=1024", "--plane=cuda_ipc")
PROMPTS = [random_ids(length, number) for number, length in enumerate((3, 64, 65, 200, 333, 500, 128, 17))]


@pytest.mark.parametrize("gpus", [(0,), (0, 1)])
def test_a_worker_of_stages_hands_over(gpus):
    """Guards pools of another process, the layers that move to a decode worker, several steps in flight between
    processes, and the end of a worker that has lost a stage; on GPUs of their own, and on one."""
    if len(gpus) > NUM_GPUS:
        pytest.skip("there is one GPU")
    settings = ServeSettings(
        model="demo",
        prefill=1,
        decode=1,
        device="cuda",
        gpus=gpus,
        prefill_pp=len(gpus),
        local_prefill="never",
        store_ram_gib=0.0,
        worker_arg=WORKER,
        prefill_arg=("--max-chunk-tokens=128", *(() if len(gpus) > 1 else ("--pp=2", "--rank-gpus", "0", "0"))),
        start_timeout_s=150.0,
    )
    plain = ModelRunner.load(locate_model("demo"))
    plain.bind_pool(torch.zeros(plain.kv_shape(42, 16)))
    expected = [one_after_the_other(plain, prompt, list(range(1, 41)), MAX_TOKENS) for prompt in PROMPTS]
    with running(settings) as (cluster, _):

        def ask(prompt: list[int]) -> list[int]:
            body = {"prompt": prompt, "max_tokens": MAX_TOKENS, "ignore_eos": True, "temperature": 0}
            body |= {"model": cluster.model, "return_token_ids": True}
            answer = httpx.post(f"{cluster.url}/v1/completions", content=json.dumps(body), timeout=60)
            assert answer.status_code == 200, answer.text
            return list(answer.json()["choices"][0]["token_ids"])

        with ThreadPoolExecutor(len(PROMPTS)) as threads:
            assert list(threads.map(ask, PROMPTS[1:])) == expected[1:]
        assert metrics(cluster).total("baton:worker_transfers_received_total") >= len(PROMPTS) - 1
        os.kill(int(re.findall(r"stage_started stage=1 of=2 .*pid=(\d+)", cluster.log(PREFILL))[-1]), signal.SIGKILL)
        assert cluster.wait_end(PREFILL, END_S), "its launcher starts it again"
        cluster.revive()
        assert ask(PROMPTS[0]) == expected[0]
        assert not cluster.stop(), "each node ends in order, stages too"
