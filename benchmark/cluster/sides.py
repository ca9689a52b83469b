"""The three processes that bench_cpu starts and measures with: a load client, transformers, and our bare model.

    python bench_sides.py load | transformers FOLDER THREADS | step FOLDER THREADS

Each reads one JSON request a line from stdin and answers it with one JSON line on stdout; whoever is not asked sleeps.
They own the clocks; what the numbers mean is bench_cpu's.
"""

from __future__ import annotations

import json
import selectors
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

READ_BYTES = 1 << 16
LOAD_TIMEOUT_S = 300.0
STEP_BLOCK_TOKENS = 16


# ---- load client --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Stream:
    """One HTTP/1.1 answer as it came in, with the time of each read."""

    connection: socket.socket
    parts: list[bytes] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)

    def read(self) -> bool:
        """Take what is there; True once the answer is complete."""
        data = self.connection.recv(READ_BYTES)
        self.parts.append(data)
        self.times_s.append(time.perf_counter())
        return not data or data.endswith(b"\r\n0\r\n\r\n") or data == b"0\r\n\r\n"

    def events(self) -> list[dict[str, Any]]:
        """The JSON of the server-sent events. Raises RuntimeError for an answer that is no stream."""
        head, _, body = b"".join(self.parts).partition(b"\r\n\r\n")
        if b" 200 " not in head.split(b"\r\n")[0] or b"data: [DONE]" not in body:
            raise RuntimeError(f"bad answer: {head[:200]!r} ... {body[-500:]!r}")
        return [json.loads(line[6:]) for line in body.splitlines() if line.startswith(b"data: {")]

    def gaps_s(self) -> list[float]:
        """Times between reads that brought text: the client's gaps between tokens, without the first."""
        times = [at for at, part in zip(self.times_s, self.parts, strict=True) if b'"text"' in part]
        return [later - earlier for earlier, later in pairwise(times)]


def load(request: dict[str, Any]) -> dict[str, Any]:
    """All prompts at once, streamed. A plain selector and no parsing before the end: the client must cost little, as
    it shares the cores with what it measures."""
    selector = selectors.DefaultSelector()
    streams = [Stream(socket.create_connection(("127.0.0.1", request["port"]), 10)) for _ in request["prompts"]]
    begin = time.perf_counter()
    for stream, prompt in zip(streams, request["prompts"], strict=True):
        stream.connection.sendall(_http_request(request["model"], prompt, request["new_tokens"]))
        selector.register(stream.connection, selectors.EVENT_READ, stream)
    while selector.get_map():
        ready = selector.select(LOAD_TIMEOUT_S)
        if not ready:
            raise TimeoutError(f"no byte for {LOAD_TIMEOUT_S} s")
        for key, _ in ready:
            if key.data.read():
                selector.unregister(key.fileobj)
                key.data.connection.close()
    end = max(stream.times_s[-1] for stream in streams)
    answers = [stream.events() for stream in streams]
    firsts = [stream.times_s[0] - begin for stream in streams]
    usages = [events[-1]["usage"] for events in answers]
    return {
        "seconds": end - begin,
        "tokens": sum(usage["completion_tokens"] for usage in usages),
        "cached_tokens": sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages),
        "ttft_ms": 1000 * sorted(firsts)[len(firsts) // 2],
        "gaps_ms": [1000 * gap for stream in streams for gap in stream.gaps_s()],
        "texts": ["".join(c["text"] for event in events for c in event["choices"]) for events in answers],
    }


def _http_request(model: str, prompt: str, new_tokens: int) -> bytes:
    body = json.dumps(
        {
            "model": model,
            "prompt": prompt,
            "max_tokens": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    lines = (
        "POST /v1/completions HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    )
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode() + body


# ---- transformers -------------------------------------------------------------------------------------------------


def transformers_side(folder: Path, threads: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """`generate` over token ids: all prompts as one left-padded batch, or one after the other. float32, greedy."""
    import torch
    import transformers

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


# ---- our model without a server -----------------------------------------------------------------------------------


def step_side(folder: Path, threads: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Bare decode steps of one greedy sequence with models.runner: what a token costs without any serving."""
    import torch

    from baton.models.batch import Draw, Row
    from baton.models.cpu.runner import ModelRunner
    from baton.node.messages.control import SamplingParams

    torch.set_num_threads(threads)
    runner = ModelRunner.load(folder)

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        ids, new_tokens = list(request["prompt"]), request["new_tokens"]
        prompt_len = len(ids)
        blocks = list(range(1 + (prompt_len + new_tokens) // STEP_BLOCK_TOKENS))
        runner.bind_pool(torch.zeros(runner.kv_shape(len(blocks), STEP_BLOCK_TOKENS), dtype=runner.kv_dtype))
        sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0)
        computed, times_ms = 0, []
        for num_generated in range(new_tokens):
            begin = time.perf_counter()
            row = Row(ids[computed:], computed, blocks, Draw(sampling, ids, prompt_len, num_generated))
            drawn = runner.step([row])[0]
            times_ms.append(1000 * (time.perf_counter() - begin))
            assert drawn is not None
            computed = len(ids)
            ids.extend(drawn.token_ids)
        return {"steps_ms": times_ms[1:]}

    return answer


def main(side: str, *arguments: str) -> None:
    answer: Callable[[dict[str, Any]], dict[str, Any]]
    if side == "load":
        answer = load
    else:
        folder, threads = Path(arguments[0]), int(arguments[1])
        answer = (transformers_side if side == "transformers" else step_side)(folder, threads)
    print(json.dumps({"ready": side}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
