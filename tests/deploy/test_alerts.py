"""The alerts under Prometheus' own tool: rules that it reads, and unit tests (alerts_test.yml) of each."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from baton.tests.deploy.chart import HERE, ROOT
from baton.tests.deploy.tools import promtool

pytestmark = pytest.mark.deploy

ALERTS = ROOT / "docs" / "monitoring" / "alerts.yml"
TESTS = HERE / "alerts_test.yml"


def run(*arguments: str | Path, folder: Path = HERE) -> subprocess.CompletedProcess[str]:
    return subprocess.run([promtool(), *arguments], cwd=folder, capture_output=True, text=True, timeout=60)


def test_prometheus_reads_the_rules() -> None:
    """Guards against a rule that Prometheus refuses: with it, it loads no rule of the file."""
    done = run("check", "rules", "--lint-fatal", ALERTS)
    assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_fire_in_trouble_and_only_then(tmp_path: Path) -> None:
    """Guards against an alert that never fires, fires at once, or says something else than what is wrong."""
    done = unit_tests_of(tmp_path, ALERTS.read_text())
    assert done.returncode == 0, done.stdout + done.stderr


def test_these_tests_notice_a_wrong_threshold(tmp_path: Path) -> None:
    """Guards the test above: promtool must fail where an alert does not fire as is said."""
    changed = ALERTS.read_text().replace("[5m])) > 0.02", "[5m])) > 0.2")
    assert changed != ALERTS.read_text()
    assert unit_tests_of(tmp_path, changed).returncode != 0


def test_each_alert_has_a_test() -> None:
    """Guards against a new alert without one."""
    alerts = {rule["alert"] for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]}
    cases: list[Any] = [
        case for each in yaml.safe_load(TESTS.read_text())["tests"] for case in each.get("alert_rule_test", [])
    ]
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == alerts
    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == alerts


def unit_tests_of(folder: Path, rules: str) -> subprocess.CompletedProcess[str]:
    (folder / ALERTS.name).write_text(rules)
    shutil.copy(TESTS, folder)
    return run("test", "rules", TESTS.name, folder=folder)
