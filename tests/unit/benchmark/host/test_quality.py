"""Guards benchmark/host/quality.py: tokens and logits of one text stay together, and the measures are what they say."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from baton.benchmark.harness.errors import BenchmarkFailed
from baton.benchmark.host.quality import PLAIN, Distance, compare, read_texts

DEMO = Path(__file__).parents[4] / "models" / "demo"
TEXT = "Once upon a time, there was a little girl named Lily. She loved to play with her toys."


def test_distance_of_known_distributions() -> None:
    """KL by its definition, in nats, of the plain model from the other and not the reverse."""
    plain, other = (torch.tensor([[p, 1 - p], [p, 1 - p]]).log() for p in (0.75, 0.25))
    distance = Distance()
    distance.take(plain, other, torch.tensor([0, 1]))
    distance.take(plain, plain, torch.tensor([0, 0]))
    found = distance.values()
    assert found["kl_mean"] == pytest.approx(0.5 * math.log(3) / 2, abs=1e-5)
    assert found["top1_agreement"] == 0.5 and found["tokens"] == 4
    assert found["loss"] == pytest.approx(-(math.log(0.25) + 3 * math.log(0.75)) / 4, abs=1e-3)


def test_finer_codes_are_nearer(tmp_path: Path) -> None:
    """Guards against rows of another text, and variants that read the plain model's weights or cache."""
    (tmp_path / "texts").write_text(f"{TEXT}<|endoftext|>short<|endoftext|>{TEXT[20:]} {TEXT}", encoding="utf-8")
    texts = read_texts(DEMO, tmp_path / "texts", 9, 16)
    assert texts.shape == (2, 16) and not torch.equal(texts[0], texts[1])
    found = dict(compare(DEMO, ("int8/auto", "fp8/auto", "fp8+inputs/auto", "bf16/fp8"), "auto", texts))
    assert found[PLAIN]["kl_mean"] == 0.0 and found[PLAIN]["top1_agreement"] == 1.0 and found[PLAIN]["loss"] < 5
    assert 0 < found["int8/auto"]["kl_mean"] < found["fp8/auto"]["kl_mean"] < 0.05
    assert found["fp8/auto"]["kl_mean"] < found["fp8+inputs/auto"]["kl_mean"] < 0.05
    assert 0 < found["bf16/fp8"]["kl_mean"] < 0.05


def test_inputs_of_4_bit_weights_have_no_codes(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkFailed, match="beside fp8, fp8_block, int8 only"):
        dict(compare(DEMO, ("int4+inputs/auto",), "auto", torch.zeros(1, 2, dtype=torch.int64)))


def test_texts_that_are_too_short_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "texts").write_text("short", encoding="utf-8")
    with pytest.raises(BenchmarkFailed, match="no text has 16 tokens"):
        read_texts(DEMO, tmp_path / "texts", 9, 16)
