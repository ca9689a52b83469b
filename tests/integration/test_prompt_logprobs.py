"""Log probabilities of prompts from real processes: what lm-evaluation-harness asks and computes, against transformers.

`loglikelihood` repeats its `local-completions` model: one POST for a batch of token ids with echo, then sums over the
continuation's tokens and compares each with the likeliest (lm_eval/models/openai_completions.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from baton.tests.integration.cluster import Cluster
from baton.tests.integration.conftest import DEMO

PAIRS = [
    ("Once upon a time there was a", " little girl who liked to play."),
    ("The cat", " sat."),
    ("Once upon a time there was a", " dragon of bronze, and 17 knights."),
]


@pytest.fixture(scope="module")
def reference() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def rows() -> list[tuple[list[int], int]]:
    """Ids of context and continuation, and the length of the context."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    made = []
    for context, continuation in PAIRS:
        ids = tokenizer.encode(context)
        made.append((ids + tokenizer.encode(continuation, add_special_tokens=False), len(ids)))
    return made


def loglikelihood(answer: dict[str, Any], lengths: list[int]) -> list[tuple[float, bool]]:
    """As lm-eval's LocalCompletionsAPI.parse_logprobs."""
    found = []
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    for choice, length in zip(choices, lengths, strict=True):
        logprobs = choice["logprobs"]
        own = logprobs["token_logprobs"][length:-1]
        tops = logprobs["top_logprobs"][length:-1]
        greedy = all(value == max(top.values()) for value, top in zip(own, tops, strict=True))
        found.append((sum(own), greedy))
    return found


def expected(reference: Any, ids: list[int], length: int) -> tuple[torch.Tensor, bool]:
    """Log probabilities of the continuation's tokens, and whether all of them are greedy."""
    with torch.inference_mode():
        logprobs = reference(torch.tensor([ids])).logits[0].float().log_softmax(-1)[length - 1 : -1]
    targets = torch.tensor(ids[length:])
    return logprobs.gather(-1, targets[:, None])[:, 0], bool((logprobs.argmax(-1) == targets).all())


@pytest.mark.parametrize("serving", ["remote", "local"])
def test_loglikelihood_as_lm_eval_computes_it(serving: str, reference: Any, rows: Any, tmp_path: Path) -> None:
    """Guards every rule of the harness's parser: entries of prompt and one token more, one float for both values, and
    no prefix taken for a prompt that was served before. Chunks of 7 tokens divide none of the prompts."""
    chunks = ("--max-chunk-tokens", "7")
    local = ("--local-prefill", "always" if serving == "local" else "never")
    with Cluster(prefill_args=chunks, decode_args=chunks, proxy_args=local, log_folder=tmp_path) as cluster:
        greedy = cluster.complete(rows[0][0], max_tokens=4, temperature=0, return_token_ids=True)
        tail = rows[0][0] + greedy["choices"][0]["token_ids"]
        batch = [*rows, (tail, len(rows[0][0]))]
        body: dict[str, Any] = {
            "prompt": [ids for ids, _ in batch],
            "temperature": 0,
            "max_tokens": 1,
            "logprobs": 1,
            "seed": 1234,
            "echo": True,
        }
        for _ in range(2):
            answer = cluster.complete(**body)
            for choice, (ids, length), (total, is_greedy) in zip(
                answer["choices"], batch, loglikelihood(answer, [length for _, length in batch]), strict=True
            ):
                values, right_greedy = expected(reference, ids, length)
                logprobs = choice["logprobs"]
                assert len(logprobs["token_logprobs"]) == len(logprobs["tokens"]) == len(ids) + 1
                assert [place for place, value in enumerate(logprobs["token_logprobs"]) if value is None] == [0]
                assert logprobs["token_logprobs"][length:-1] == pytest.approx(values.tolist(), abs=1e-4)
                assert total == pytest.approx(float(values.sum()), abs=1e-3) and is_greedy == right_greedy
        assert is_greedy, "what the model itself continues with"
        alone = cluster.complete(**body | {"prompt": rows[0][0], "max_tokens": 0, "logprobs": 3})
        (choice,) = alone["choices"]
        assert "".join(choice["logprobs"]["tokens"]) == choice["text"] and choice["finish_reason"] == "length"
        assert len(choice["logprobs"]["tokens"]) == len(rows[0][0]) and alone["usage"]["completion_tokens"] == 0
        ranked = cluster.complete(rows[0][0], max_tokens=1, prompt_logprobs=2)
        entries = ranked["choices"][0]["prompt_logprobs"]
        assert entries[0] is None and len(entries) == len(rows[0][0])
        for token, entry in zip(rows[0][0][1:], entries[1:], strict=True):
            assert 2 <= len(entry) <= 3 and entry[str(token)]["rank"] >= 1
