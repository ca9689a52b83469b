"""Workers of two ranks, a process and a GPU each, answer as one rank does, with KV that moves between both.

With one GPU all ranks are on it: their processes take turns, so it is slow, and the links between GPUs are left out.
Run it in a separate process, as tests/gpu/test_runner.py says.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx
import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.benchmark.cluster.completions import random_ids
from baton.benchmark.cluster.running import metrics, running
from baton.launch.local import ServeSettings
from baton.models.cpu.runner import ModelRunner
from baton.node.modelhub import locate_model
from baton.tests.unit.models.cuda.ahead import one_after_the_other

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]
TWO_GPUS = torch.cuda.is_available() and torch.cuda.device_count() > 1

MAX_TOKENS = 24
WORKER = ("--dtype=float32", "--max-num-seqs=16", "--num-blocks=300", "--max-model-len=1024", "--plane=cuda_ipc")
PROMPTS = [random_ids(length, number) for number, length in enumerate((3, 64, 65, 200, 333, 500, 128, 17))]
SPECS: list[dict[str, float]] = [
    {"temperature": 0},
    {"temperature": 0.8, "top_p": 1.0},  # else the model's own
    {"temperature": 0.9, "top_p": 0.9, "frequency_penalty": 0.5, "logprobs": 2},
]


@dataclass(frozen=True)
class Answers:
    tokens: list[list[int]]
    received: float


def on_one_gpu(ranks: int) -> tuple[str, ...]:
    """Arguments for a worker whose ranks share the only GPU."""
    return () if TWO_GPUS or ranks < 2 else (f"--tp={ranks}", "--rank-gpus", *["0"] * ranks)


def answers(prefill: int, decode: int) -> Answers:
    """Of a cluster whose workers have so many ranks; prefill 0: there is no such worker."""
    settings = ServeSettings(
        model="demo",
        prefill=1 if prefill else 0,
        decode=1,
        device="cuda",
        gpus=(0, 1) if TWO_GPUS else (0,),
        prefill_tp=prefill if TWO_GPUS and prefill else None,
        decode_tp=decode if TWO_GPUS else None,
        local_prefill="never" if prefill else None,
        store_ram_gib=0.0,
        worker_arg=WORKER,
        prefill_arg=("--max-chunk-tokens=128", *on_one_gpu(prefill)),
        decode_arg=on_one_gpu(decode),
        start_timeout_s=150.0,
    )
    with running(settings) as (cluster, _):

        def ask(numbered: tuple[int, list[int]]) -> list[int]:
            number, prompt = numbered
            body = {"prompt": prompt, "max_tokens": MAX_TOKENS, "ignore_eos": True, "seed": number}
            body |= {"model": cluster.model, "return_token_ids": True, **SPECS[number % len(SPECS)]}
            answer = httpx.post(f"{cluster.url}/v1/completions", content=json.dumps(body), timeout=60)
            assert answer.status_code == 200, answer.text
            return list(answer.json()["choices"][0]["token_ids"])

        with ThreadPoolExecutor(len(PROMPTS)) as threads:
            found = list(threads.map(ask, enumerate(PROMPTS)))
        return Answers(found, metrics(cluster).total("baton:worker_transfers_received_total"))


@pytest.fixture(scope="module")
def of_one_rank() -> list[list[int]]:
    """On the CPU."""
    plain = ModelRunner.load(locate_model("demo"))
    plain.bind_pool(torch.zeros(plain.kv_shape(42, 16)))
    specs = [{name: value for name, value in spec.items() if name != "logprobs"} for spec in SPECS]
    return [
        one_after_the_other(plain, prompt, list(range(1, 41)), MAX_TOKENS, seed=number, **specs[number % len(specs)])
        for number, prompt in enumerate(PROMPTS)
    ]


@pytest.mark.parametrize(("prefill", "decode"), [(2, 1), (1, 2), (0, 2)])
def test_ranks_answer_as_one(of_one_rank, prefill, decode):
    """Guards exchanges over links between GPUs, records of steps, pools of another process, and units that move between
    workers of unequal sizes."""
    found = answers(prefill, decode)
    assert found.tokens == of_one_rank
    if prefill:
        assert found.received >= len(PROMPTS)
