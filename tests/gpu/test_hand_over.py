"""Sequences with adapters and with drafts move from one GPU worker to another: tokens of one worker on a CPU.

Run it in a separate process, as tests/gpu/test_runner.py says.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.benchmark.cluster.completions import random_ids
from baton.benchmark.cluster.running import metrics, running
from baton.launch.local import ServeSettings
from baton.models.config import ModelConfig
from baton.node.modelhub import locate_model
from baton.testing.adapter_folders import write_adapter

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]
GPUS = tuple(range(min(2, torch.cuda.device_count()))) if torch.cuda.is_available() else ()

MAX_TOKENS = 40
WORKER = ("--dtype=float32", "--max-num-seqs=16", "--num-blocks=300", "--max-model-len=1024")
LENGTHS = (3, 64, 65, 200, 333, 128)
MODELS = "demo", "one", "two"


@dataclass(frozen=True)
class Answers:
    tokens: list[list[int]]
    received: float
    accepted: float


def answers(adapters: Path, device: str, prefill: int, *args: str) -> Answers:
    """Of a cluster with so many prefill workers; each prompt repeats itself, and goes to each model, seeded and not."""
    settings = ServeSettings(
        model="demo",
        prefill=prefill,
        decode=1,
        device=device,
        gpus=GPUS if device == "cuda" else (),
        local_prefill="never" if prefill else None,
        lora_modules=tuple(f"{name}={adapters / name}" for name in MODELS[1:]),
        store_ram_gib=0.0,
        worker_arg=(*WORKER, *args),
        start_timeout_s=150.0,
    )
    made = [random_ids(length, number) * 2 for number, length in enumerate(LENGTHS)]
    asked = [(prompt, model, heat) for prompt in made for model in MODELS for heat in (0.0, 0.7)]
    with running(settings) as (cluster, _):

        def ask(number: int) -> list[int]:
            prompt, model, heat = asked[number]
            body = {"model": cluster.model if model == "demo" else model, "prompt": prompt, "max_tokens": MAX_TOKENS}
            body |= {"ignore_eos": True, "seed": number, "temperature": heat, "top_p": 1.0, "return_token_ids": True}
            answer = httpx.post(f"{cluster.url}/v1/completions", content=json.dumps(body), timeout=60)
            assert answer.status_code == 200, answer.text
            return list(answer.json()["choices"][0]["token_ids"])

        with ThreadPoolExecutor(12) as threads:
            found = list(threads.map(ask, range(len(asked))))
        page = metrics(cluster)
        moved = page.total("baton:worker_transfers_received_total")
        return Answers(found, moved, page.total("vllm:spec_decode_num_accepted_tokens_total"))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, config = tmp_path_factory.mktemp("adapters"), ModelConfig.from_folder(locate_model("demo"))
    for number, name in enumerate(MODELS[1:], 1):
        write_adapter(root / name, config, rank=8 * number, seed=number, spread=0.1)
    return root


@pytest.fixture(scope="module")
def of_one_worker(adapters: Path) -> list[list[int]]:
    found = answers(adapters, "cpu", 0).tokens
    different = {tuple(tokens) for tokens in found}
    assert len(different) > len(found) // 2, "adapters that change nothing"
    return found


@pytest.mark.parametrize("plane", ["cuda_ipc", "nccl"])
def test_adapters_and_drafts_move(adapters, of_one_worker, plane):
    """Guards an adapter's slot, history and drafts of a sequence whose KV came from another worker."""
    if plane == "nccl" and len(GPUS) < 2:
        pytest.skip("NCCL wants a GPU for each of its ends")
    found = answers(adapters, "cuda", 1, "--speculate=ngram", f"--plane={plane}", "--max-loras=2")
    assert found.tokens == of_one_worker
    assert found.received >= len(of_one_worker) // 2 and found.accepted > 0
