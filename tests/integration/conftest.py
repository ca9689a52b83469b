"""What the integration tests share: the oracle, transformers' own greedy generation with the demo model in float32."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from baton.tests.integration.prompts import PROMPTS

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"
MAX_TOKENS = 32


class Oracle:
    """Greedy answers of `transformers`, computed once a prompt."""

    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(DEMO)
        self._model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
        self._answer = cache(self._generate)

    def answer(self, prompt: str, max_tokens: int = MAX_TOKENS) -> tuple[str, int]:
        """Text without special tokens, and the number of generated tokens."""
        return self._answer(prompt, max_tokens)

    def _generate(self, prompt: str, max_tokens: int) -> tuple[str, int]:
        ids = self.tokenizer(prompt, return_tensors="pt").input_ids
        with torch.inference_mode():
            out = self._model.generate(
                ids, max_new_tokens=max_tokens, do_sample=False, num_beams=1, repetition_penalty=1.0
            )
        new = out[0, ids.shape[1] :].tolist()
        return self.tokenizer.decode(new, skip_special_tokens=True), len(new)


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    torch.set_num_threads(2)
    return Oracle()


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    return PROMPTS
