"""What the integration tests share: the oracle, transformers' own greedy generation with the demo model in float32."""

from __future__ import annotations

from collections.abc import Sequence
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

        self.tokenizer = AutoTokenizer.from_pretrained(DEMO, padding_side="left")
        self._model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
        self._ends = self._model.generation_config.eos_token_id
        self.tokenizer.pad_token_id = self._ends[0]
        self._answers: dict[str, tuple[str, int]] = {}

    def answers(self, prompts: Sequence[str]) -> list[tuple[str, int]]:
        """Texts without special tokens, and the numbers of generated tokens."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._answers]
        if missing:
            self._answers |= zip(missing, self._generate(missing), strict=True)
        return [self._answers[prompt] for prompt in prompts]

    def _generate(self, prompts: list[str]) -> list[tuple[str, int]]:
        """All in one batch, which takes hardly longer than one of them."""
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True)
        with torch.inference_mode():
            out = self._model.generate(
                inputs.input_ids,
                attention_mask=inputs.attention_mask,
                max_new_tokens=MAX_TOKENS,
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                pad_token_id=self._ends[0],
            )
        return [self._answer(row[inputs.input_ids.shape[1] :].tolist()) for row in out]

    def _answer(self, ids: list[int]) -> tuple[str, int]:
        """Padding comes after the first end of text, which counts."""
        length = next((at + 1 for at, token in enumerate(ids) if token in self._ends), len(ids))
        return self.tokenizer.decode(ids[:length], skip_special_tokens=True), length


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    torch.set_num_threads(2)
    return Oracle()


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    return PROMPTS
