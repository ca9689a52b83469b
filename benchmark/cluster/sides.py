"""What cpu.py compares the server with, each in a process of its own: transformers, and our model without a server.

Each function loads a model and returns what answers a request. They take the times; cpu.py interprets them. The one
file of the package that imports transformers, which the extra `test` brings.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from baton.models.batch import Draw, Row
from baton.models.cpu.runner import ModelRunner
from baton.node.messages.control import SamplingSpec

STEP_BLOCK_TOKENS = 16


def transformers_side(folder: Path, threads: int) -> Callable[[dict[str, Any]], object]:
    """`generate` over token ids: all prompts as one left-padded batch, or one after the other. float32, greedy."""
    import transformers  # only the process of this side needs it

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # as ignore_eos: the end token is a token like any other

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
        return out[:, width:].tolist()

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        prompts = request["prompts"]
        begin = time.perf_counter()
        if request["batched"]:
            made = generate(prompts, request["new_tokens"])
        else:
            made = [generate([prompt], request["new_tokens"])[0] for prompt in prompts]
        return {"seconds": time.perf_counter() - begin, "tokens": sum(map(len, made)), "ids": made}

    return answer


def step_side(folder: Path, threads: int) -> Callable[[dict[str, Any]], object]:
    """Milliseconds of each decode step of one greedy sequence: the cost of a token without any serving."""
    torch.set_num_threads(threads)
    runner = ModelRunner.load(folder)

    def answer(request: dict[str, Any]) -> list[float]:
        ids, new_tokens = list(request["prompt"]), request["new_tokens"]
        prompt_len = len(ids)
        blocks = list(range(1 + (prompt_len + new_tokens) // STEP_BLOCK_TOKENS))
        runner.bind_pool(torch.zeros(runner.kv_shape(len(blocks), STEP_BLOCK_TOKENS), dtype=runner.kv_dtype))
        sampling = SamplingSpec(max_tokens=new_tokens, temperature=0.0)
        computed, times_ms = 0, []
        for num_generated in range(new_tokens):
            begin = time.perf_counter()
            row = Row(ids[computed:], computed, blocks, Draw(sampling, ids, prompt_len, num_generated))
            drawn = runner.step([row])[0]
            times_ms.append(1000 * (time.perf_counter() - begin))
            assert drawn is not None
            computed = len(ids)
            ids.extend(drawn.token_ids)
        return times_ms[1:]

    return answer
