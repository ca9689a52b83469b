"""simulator.latency and simulator.fit: the model follows its formula, and the fit recovers its coefficients."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.node.errors import SettingsError
from baton.simulator.fit import MeasuredStep, fit, read_steps
from baton.simulator.latency import PROFILES, Cost, RowWork, load_profile

ESTIMATED = {"h100x2-qwen3-32b", "h200-llama-70b"}
"""Set by arithmetic; their `about` says so."""
SHIPPED = sorted({path.stem for path in PROFILES.glob("*.json")} - ESTIMATED)
H200 = load_profile("h200-llama-8b")


@given(st.lists(st.integers(2000, 5000), min_size=1, max_size=5))
def test_chunks_of_a_prompt_cost_what_the_prompt_costs(chunks: list[int]) -> None:
    """Guards the quadratic term: it counts the tokens before a chunk."""
    start, total = 0, 0.0
    for length in chunks:
        total += H200.step_s([RowWork(start, length)]) - H200.prefill.a
        start += length
    assert total == pytest.approx(H200.step_s([RowWork(0, start)]) - H200.prefill.a)


def test_a_step_of_both_kinds_reads_the_weights_once() -> None:
    """Guards mixed steps (colocated serving): the fixed cost of a decode step is not added to a prompt's."""
    prompt, rows = [RowWork(0, 3000)], [RowWork(999, 1), RowWork(1999, 1)]
    assert H200.step_s(rows) == pytest.approx(H200.decode.seconds(3000, 2))
    beside = H200.step_s([*prompt, *rows]) - H200.step_s(prompt)
    assert beside == pytest.approx(H200.decode.seconds(3000, 2) - H200.decode.a)
    assert H200.step_s([RowWork(0, 9)]) == H200.decode.seconds(0, 9)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_profiles_are_fitted_to_their_steps(name: str) -> None:
    """Guards against a profile without measurements: the steps beside it give its coefficients."""
    profile, steps = load_profile(name), read_steps(PROFILES / f"{name}.steps.jsonl")
    for kind, cost in (("prefill", profile.prefill), ("decode", profile.decode)):
        found = fit([step for step in steps if step.kind == kind]).cost
        assert (cost.a, cost.b, cost.c) == pytest.approx((found.a, found.b, found.c), rel=1e-3)


def test_an_invalid_profile_is_an_error(tmp_path: Path) -> None:
    """Guards the command line against a traceback for a wrong name or file."""
    with pytest.raises(SettingsError, match="shipped are"):
        load_profile("h100")
    file = tmp_path / "p.json"
    file.write_text('{"name": "x"}')
    with pytest.raises(SettingsError, match="is no profile"):
        load_profile(str(file))


def _steps(kind: str, cost: Cost, noise: float, seed: int) -> list[MeasuredStep]:
    chance, steps = random.Random(seed), []
    for _ in range(60):
        lengths = tuple(chance.randint(1, 4000) for _ in range(chance.randint(1, 8))) if kind == "prefill" else ()
        context, batch = chance.randint(100, 500_000), chance.randint(1, 256)
        step = MeasuredStep(kind, lengths, context, len(lengths) or batch, 1.0)  # type: ignore[arg-type]
        seconds = sum(c * t for c, t in zip((cost.a, cost.b, cost.c), step.terms, strict=True))
        steps.append(
            MeasuredStep(step.kind, lengths, context, step.batch, seconds * chance.uniform(1 - noise, 1 + noise))
        )
    return steps


@pytest.mark.parametrize("kind", ["prefill", "decode"])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_the_fit_recovers_the_coefficients(kind: str, noise: float) -> None:
    """Guards the least squares with and without noise; the reported error matches the noise."""
    cost = Cost(0.004, 2e-5, 4e-10) if kind == "prefill" else Cost(0.004, 3e-8, 1.5e-5)
    found = fit(_steps(kind, cost, noise, seed=3))
    tolerance = 1e-6 if not noise else 0.1
    assert (found.cost.b, found.cost.c) == pytest.approx((cost.b, cost.c), rel=tolerance)
    assert found.cost.a == pytest.approx(cost.a, rel=tolerance * 2)
    assert found.median_error <= noise + 1e-9 and found.worst_error <= 2 * noise + 1e-9


def test_no_coefficient_is_negative() -> None:
    """Guards extrapolation: a longer prompt must not cost less."""
    steps = [MeasuredStep("prefill", (n,), 0, 1, seconds) for n, seconds in ((1000, 0.01), (2000, 0.03), (4000, 0.1))]
    cost = fit(steps).cost
    assert min(cost.a, cost.b, cost.c) == 0.0 < max(cost.a, cost.b, cost.c)


def test_bad_step_files_name_the_line(tmp_path: Path) -> None:
    """Guards the reader's errors."""
    file = tmp_path / "steps.jsonl"
    file.write_text('{"kind": "decode", "lengths": [], "context": 1, "batch": 1, "seconds": 0.1}\n{"kind": "walk"}\n')
    with pytest.raises(SettingsError, match=r"steps.jsonl:2"):
        read_steps(file)
    with pytest.raises(SettingsError, match="three"):
        fit(_steps("decode", Cost(1.0, 0.0, 0.0), 0.0, 1)[:2])
