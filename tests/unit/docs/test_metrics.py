"""docs/metrics.md, the alerts, the scrape configuration and the Grafana dashboard: true of the code as it is."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from baton.node.counters import TransferCounters
from baton.node.credentials import Credentials
from baton.node.endpoint import Endpoint
from baton.node.sockets import Context
from baton.proxy.dispatcher import Dispatcher
from baton.proxy.metrics.counters import ENGINE_COUNTERS, WORKER_COUNTERS
from baton.proxy.settings import ProxySettings
from baton.scripts import metrics_page
from baton.tests.unit.decode.test_role import Bench as DecodeBench
from baton.tests.unit.prefill.test_role import Bench as PrefillBench

MONITORING = Path(__file__).resolve().parents[3] / "docs" / "monitoring"
_NAME = re.compile(r"\b(?:vllm:|baton:|gen_ai_)\w+")
_OTHER_NAMES = {"up"}
"""What Prometheus itself makes."""


@pytest.fixture(scope="module")
def known() -> set[str]:
    return metrics_page.names()


def demand_sound(expression: str, known: set[str]) -> None:
    """Its metrics exist, and its brackets close."""
    used = set(_NAME.findall(expression)) or _OTHER_NAMES & set(re.findall(r"\w+", expression))
    assert used, f"no metric in {expression}"
    unknown = used - known - _OTHER_NAMES
    assert not unknown, f"{unknown} in {expression}"
    for opening, closing in ("()", "[]", "{}"):
        assert expression.count(opening) == expression.count(closing), expression


def test_the_page_is_that_of_the_code() -> None:
    """Guards against a page that lists removed metrics or lacks new ones."""
    written = metrics_page.PAGE.read_text()
    assert written == metrics_page.page(), "run: python3 -m baton.scripts.metrics_page"


async def test_each_counter_has_a_description() -> None:
    """Guards against a counter of the engine or of a worker without a description."""
    context = Context(Credentials("proxy"))
    endpoint = Endpoint(context, "proxy", "tcp://127.0.0.1:0")
    counted = set(Dispatcher(endpoint, ProxySettings(), ["m"]).counters())
    endpoint.close()
    context.close()
    assert counted == set(ENGINE_COUNTERS)
    by_workers = {each.name for each in fields(TransferCounters)}
    for bench in (PrefillBench(), DecodeBench()):
        by_workers |= set(bench.loop._load().counters)
    assert by_workers <= set(WORKER_COUNTERS)


def test_alerts_use_metrics_that_exist(known: set[str]) -> None:
    """Guards against an alert that can never fire, and one that does not say what is wrong."""
    rules = [
        rule for group in yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"] for rule in group["rules"]
    ]
    assert len({rule["alert"] for rule in rules}) == len(rules) > 10
    for rule in rules:
        demand_sound(rule["expr"], known)
        assert rule["labels"]["severity"] in ("warning", "critical") and rule["annotations"]["summary"]


def test_the_scrape_configuration_names_the_alerts() -> None:
    """Guards the pair: the job that the alerts ask for, and the file that they are in."""
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    assert config["rule_files"] == ["alerts.yml"]
    assert [job["job_name"] for job in config["scrape_configs"]] == ["baton"]
    assert 'up{job="baton"}' in (MONITORING / "alerts.yml").read_text()


def panels() -> Iterator[dict[str, Any]]:
    yield from json.loads((MONITORING / "grafana.json").read_text())["panels"]


def test_the_dashboard_uses_metrics_that_exist(known: set[str]) -> None:
    """Guards against panels that stay empty, and one that lies on another."""
    drawn = [panel for panel in panels() if panel["type"] != "row"]
    assert len(drawn) > 15
    for panel in drawn:
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            demand_sound(target["expr"], known)
    assert len({panel["id"] for panel in panels()}) == len(list(panels()))
    for one, other in itertools.combinations([panel["gridPos"] for panel in panels()], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above, (one, other)


def test_the_page_of_the_proxy_draws_metrics_that_exist(known: set[str]) -> None:
    """Guards the built-in dashboard in the same way."""
    scripts = MONITORING.parents[1] / "proxy" / "metrics" / "dashboard"
    text = "".join(path.read_text() for path in scripts.glob("*.js"))
    bases = {re.sub(r"_(bucket|sum|count)$", "", name) for name in known}
    used = set(_NAME.findall(text)) - {"baton:worker_"}
    assert used and not {re.sub(r"_(bucket|sum|count)$", "", name) for name in used} - bases
