"""Guards `baton bench ttft-tiers`: sizes that force a prompt out of a tier, and the proof of where it came from."""

from __future__ import annotations

from pathlib import Path

from baton.benchmark.cluster import ttft_tiers as bench
from baton.benchmark.cluster.metrics import MetricsPage
from baton.benchmark.cluster.running import ServedModel

SIZES = bench.TierSizes(64, 1 << 23, (32768, 2048), 3, 128)


def test_a_longest_prompt_fills_the_pool() -> None:
    """With room for two, the next state would find a prompt in the pool, and call it the tier below."""
    prompt = SIZES.blocks(32768)
    assert prompt < SIZES.pool_blocks < prompt + SIZES.blocks(2048)


def test_the_store_holds_every_prompt() -> None:
    """One that was evicted is computed, and would be a wrong time of RAM."""
    tokens = (3 + 1) * (32768 + 2048 + 2 * 129)
    assert SIZES.store_gib * (1 << 30) > 1.2 * tokens * (1 << 23) / 64


def test_what_is_served_is_what_was_sized() -> None:
    """A context below the longest request would refuse it after all others were measured."""
    options = bench._options(["--worker-arg=--x"])
    settings = bench.settings_of(SIZES, ServedModel("model", ("--load-format=dummy",), 64, 1), Path("disk"), options)
    assert settings.worker_arg[:2] == (f"--num-blocks={SIZES.pool_blocks}", "--max-model-len=32897")
    assert settings.worker_arg[-2:] == ("--load-format=dummy", "--x")
    assert (settings.prefill, settings.decode, settings.store_disk_gib) == (0, 1, SIZES.store_gib)


def page(ram: float, disk: float, loaded_bytes: float, seconds: float) -> MetricsPage:
    return MetricsPage(
        "# TYPE baton:prompt_tokens counter\n"
        f'baton:prompt_tokens_total{{source="ram"}} {ram}\nbaton:prompt_tokens_total{{source="disk"}} {disk}\n'
        f"# TYPE baton:worker_store_loaded_bytes counter\nbaton:worker_store_loaded_bytes_total {loaded_bytes}\n"
        f"# TYPE baton:worker_store_actual_seconds counter\nbaton:worker_store_actual_seconds_total {seconds}\n"
    )


def test_sources_and_speeds_are_of_the_time_between() -> None:
    """What an earlier state loaded must not count for this one; where nothing was loaded there is no speed."""
    before, after = page(100, 0, 1e9, 1.0), page(100, 64, 3e9, 1.5)
    assert bench.sources(before, after) == {"ram": 0, "disk": 64}
    assert bench.speeds(before, after) == {"load_gb_per_s": 4.0, "disk_gb_per_s": None}
    assert bench.speeds(after, after)["load_gb_per_s"] is None
