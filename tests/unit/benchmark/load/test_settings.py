"""Contradicting settings are rejected before the first request, by an error that names the option."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from baton.benchmark.load.settings import ServingSettings
from baton.node.settings import parse


def read(*argv: str) -> ServingSettings:
    return parse(ServingSettings, argv, "bench_serving", "", environ={})


def test_the_command_line_is_vllms() -> None:
    """Users paste their `vllm bench serve` lines."""
    settings = read(
        *("--request-rate", "1.5", "inf", "--goodput", "ttft:1000", "tpot:15", "--random-input-len", "64"),
        *("--random-output-len", "8", "--num-prompts", "10", "--burstiness", "0.5", "--max-concurrency", "4"),
        *("--percentile-metrics", "ttft,itl", "--metric-percentiles", "99.9,90", "--ignore-eos", "--save-result"),
        *("--seed", "1", "2", "--backend", "openai-chat"),
    )
    assert settings.rates == (1.5, math.inf) and settings.seed == (1, 2) and settings.chat and not settings.as_ids
    assert settings.objectives.limits_ms == {"ttft": 1000, "tpot": 15}
    assert settings.percentiles == (50, 90, 99, 99.9) and settings.shown_metrics == ("ttft", "itl")


def test_defaults() -> None:
    """Without a word of when, all are due at once, but for a trace or a ramp, which say it themselves."""
    assert read().rates == (math.inf,) and read().as_ids and read().extra_fields == {}
    assert read("--trace", "t").rates == (None,) and read("--ramp-up-strategy", "linear").rates == (None,)
    assert not read("--turns", "3").as_ids and not read("--prompt-as", "text").as_ids
    assert read("--extra-body", '{"top_k": 3}').extra_fields == {"top_k": 3}


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--request-rate", "0"], "--request-rate '0'"),
        (["--request-rate", "fast"], "--request-rate 'fast'"),
        (["--request-rate", "nan"], "--request-rate 'nan'"),
        (["--compare", "http://a"], "--compare needs two"),
        (["--model", "a", "b"], "--model: one name"),
        (["--trace", "a", "--dataset-path", "b"], "exclude one another"),
        (["--turns", "2", "--trace", "a"], "--turns"),
        (["--turns", "2", "--prompt-as", "ids"], "--turns needs text"),
        (["--backend", "openai-chat", "--prompt-as", "ids"], "--prompt-as text"),
        (["--ramp-up-strategy", "linear", "--request-rate", "1"], "--ramp-up-strategy"),
        (["--trace", "a", "--request-rate", "1", "--trace-speed", "2"], "--trace-speed"),
        (["--find-rate"], "--find-rate needs --goodput"),
        (["--find-rate", "--goodput", "ttft:1", "--request-rate", "1", "2"], "one --request-rate"),
        (["--find-rate", "--goodput", "ttft:1", "--request-rate", "inf"], "one --request-rate"),
        (["--duration-s", "5"], "--duration-s needs"),
        (["--duration-s", "5", "--request-rate", "inf"], "--duration-s needs"),
        (["--duration-s", "5", "--num-prompts", "5", "--request-rate", "1"], "exclude one another"),
        (["--goodput", "itl:5"], "objective 'itl:5'"),
        (["--metric-percentiles", "101"], "--metric-percentiles"),
        (["--metric-percentiles", "a"], "--metric-percentiles"),
        (["--percentile-metrics", "ttft,latency"], "--percentile-metrics"),
        (["--extra-body", "[1]"], "--extra-body"),
    ],
)
def test_contradictions_are_told(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Reported after an hour's run, or never, they cost that hour."""
    with pytest.raises(SystemExit) as ended:
        read(*argv)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_the_key_comes_from_the_environment() -> None:
    assert parse(ServingSettings, [], "b", "", environ={"OPENAI_API_KEY": "k"}).api_key == "k"
    assert read().html is None and read("--html", "r.html").html == Path("r.html")
