"""python -m baton.simulator: each command prints its table or JSON; errors are one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from baton.simulator.__main__ import COMMANDS, main
from baton.simulator.latency import PROFILES, load_profile
from baton.simulator.report import GOODPUT, advice

SMALL = ("--requests", "20", "--rate", "5", "--output-tokens", "8")


def _rows(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_replay_is_the_same_step_by_step(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards the option and the JSON output."""
    shown = []
    for more in ((), ("--step-by-step",)):
        assert main(["replay", *SMALL, "--json", *more]) == 0
        rows = {row[""]: row["value"] for row in _rows(capsys.readouterr().out)}
        shown.append((rows["requests"], rows["failed"], rows["TTFT mean (ms)"], rows["ITL p99 (ms)"]))
    assert shown[0] == shown[1] and shown[0][:2] == (20, 0)


def test_replay_shows_the_source_of_the_prompts_kv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards the options of the store: a worker loads a prompt that another worker computed."""
    line = {"input_length": 5120, "output_length": 2, "hash_ids": list(range(10))}
    trace = "".join(json.dumps({"timestamp": 3000 * n, **line}) + "\n" for n in range(8))
    (tmp_path / "t").write_text(trace)
    options = ("--trace", str(tmp_path / "t"), "--prefill", "2", "--policy", "round-robin", "--store-loads", "always")
    options += ("--local-prefill", "never")
    found = []
    for store in ((), ("--store-ram-gib", "2", "--store-disk-gib", "2")):
        assert main(["replay", *options, *store, "--json"]) == 0
        rows = {row[""]: row["value"] for row in _rows(capsys.readouterr().out)}
        found.append([rows[f"prompt tokens, {source}"] for source in ("gpu", "ram", "disk", "computed")])
    # Eight prompts of 5120 tokens on two workers. All but the last block of 64 can be loaded, unless computed locally.
    assert found[0] == [6 * 5056, 0, 0, 2 * 5120 + 6 * 64]
    assert found[1] == [6 * 5056, 5056, 0, 5120 + 7 * 64]


def test_loss_and_overload_show_each_case(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards the rows of the studies: the lost worker; every pair of policies."""
    assert main(["loss", *SMALL, "--prefill", "2", "--decode", "2", "--json"]) == 0
    assert [row["lost"] for row in _rows(capsys.readouterr().out)] == ["none", "p0", "d0"]
    assert main(["overload", *SMALL, "--factor", "50", "--max-queue", "2", "--json"]) == 0
    rows = _rows(capsys.readouterr().out)
    assert {row["prefill order"] for row in rows} == {"fcfs", "sjf"} and {row["requests"] for row in rows} == {20}


def test_place_finds_a_split(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards the table of splits."""
    assert main(["place", *SMALL, "--gpus", "2", "--rounds", "0", "--chunk-tokens", "256"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = {line.split("|")[1].strip() for line in lines[2:] if "|" in line}
    assert found <= {"2 adaptive", "1P1D", "2 colocated, chunks of 256", "1 colocated tp2, chunks of 256"}
    assert "1 colocated tp2, chunks of 256" in found, "it has the highest bound of its kind"
    assert "15 + 100" in lines[2] or "7 + 107" in lines[2]
    assert lines[-1].startswith("Rates closer than a tenth are the same")


def test_place_says_what_to_do() -> None:
    """Guards the words: which way is better, by how much, and that a small difference is none."""

    def said(split: float, colocated: float, adaptive: float) -> str:
        rates = {"2P2D": split, "4 colocated, chunks of 512": colocated, "4 adaptive": adaptive}
        rows = [{"split": name, GOODPUT: rate} for name, rate in sorted(rates.items(), key=lambda each: -each[1])]
        return advice(rows)

    assert "Disaggregate: 2P2D serves 1.50 times" in said(15.0, 10.0, 15.0)
    assert "Do not disaggregate: 4 colocated, chunks of 512 serves 2.00 times" in said(5.0, 10.0, 10.0)
    assert "It makes little difference" in said(10.2, 10.0, 10.0)
    assert "Adaptive roles serve only 0.50 times" in said(10.0, 10.0, 5.0)
    assert "No way of serving" in said(0.0, 0.0, 0.0)


def test_tiers_of_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards the table of sizes."""
    line = {"timestamp": 0, "input_length": 512, "output_length": 1, "hash_ids": [3]}
    (tmp_path / "t").write_text(f"{json.dumps(line)}\n" * 4)
    assert main(["tiers", "--trace", str(tmp_path / "t"), "--million-tokens", "1", "--json"]) == 0
    assert [row["hit rate"] for row in _rows(capsys.readouterr().out)] == ["75.0%", "75.0%"]


def test_fit_writes_a_profile_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards fitting a profile to measured steps."""
    steps, out = PROFILES / "h200-llama-8b.steps.jsonl", tmp_path / "mine.json"
    assert main(["fit", "--steps", str(steps), "--profile", "h200-llama-8b", "--out", str(out)]) == 0
    assert "error p50" in capsys.readouterr().out
    assert load_profile(str(out)).decode.a == pytest.approx(load_profile("h200-llama-8b").decode.a, rel=1e-3)


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["replay", "--profile", "none"], "no profile none"),
        (["replay", "--requests", "0"], "no --trace"),
        (["replay", "--prompt-tokens", "1000000"], "fits"),
        (["replay", "--store-disk-gib", "1"], "needs --store-ram-gib"),
        (["replay", "--store-ram-gib", "0.001"], "do not fit"),
        (["fit", "--steps", "/nowhere"], "cannot read"),
        (["fit", "--steps", "/nowhere", "--profile", "x"], "belong together"),
    ],
)
def test_errors_are_one_line(argv: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards the command line: status 2 and a reason."""
    try:
        status = main(argv)
    except SystemExit as left:  # an option that is wrong by itself
        status = int(left.code or 0)
    error = capsys.readouterr().err
    assert status == 2 and complaint in error and error.count("\n") == 1


def test_usage_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards --help."""
    assert (main([]), main(["--help"]), main(["dance"])) == (2, 0, 2)
    error = capsys.readouterr().err
    assert all(name in error for name in COMMANDS)
