"""Guards `baton bench masks`: each kind's example is one that its schema allows, and every kind has its line."""

from __future__ import annotations

import json

import pytest

from baton.benchmark.host.masks import IN_BATCHES, KINDS, main


def test_every_kind_is_walked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--repeat", "1", "--rows", "3", "--threads", "2"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [line["name"] for line in lines if line["what"] == "kind"] == list(KINDS)
    assert [line["name"] for line in lines if line["what"] == "batch"] == list(IN_BATCHES)
