"""What the chart asks Prometheus for, and shows: metrics that exist, and the rules and dashboard of the repository."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from baton.tests.deploy.chart import ROOT, matches, of_kind, render

pytestmark = pytest.mark.deploy

MONITORING = ROOT / "docs" / "monitoring"
METRIC = re.compile(r"\b(?:vllm|baton):\w+|\bgen_ai_\w+")
HISTOGRAM = re.compile(r"_(bucket|sum|count)$")


def known_metrics() -> set[str]:
    """Those of the page, which a test compares with the code."""
    return set(METRIC.findall((ROOT / "docs" / "metrics.md").read_text()))


def demand_known(expression: str) -> None:
    known = known_metrics()
    used = METRIC.findall(expression)
    assert used or "up{" in expression, expression
    unknown = {each for each in used if each not in known and HISTOGRAM.sub("", each) not in known}
    assert not unknown, expression


def test_autoscalers_ask_for_metrics_that_exist() -> None:
    """Guards against a query that finds nothing: KEDA would take it for 0, or fall back for ever."""
    queries = [
        trigger["metadata"]["query"]
        for each in of_kind(render("keda"), "ScaledObject")
        for trigger in each["spec"]["triggers"]
    ]
    assert len(queries) == 4
    for query in queries:
        demand_known(query)
    metrics = [
        metric["external"]["metric"]
        for each in of_kind(render("hpa", "autoscaling.signals={slo,queue}"), "HorizontalPodAutoscaler")
        for metric in each["spec"]["metrics"]
    ]
    assert len(metrics) == 4
    assert {each["name"] for each in metrics} <= {name.replace(":", "_") for name in known_metrics()}
    # The labels that Prometheus Operator gives to what it scrapes from the Service, and the metrics' own.
    assert all(set(each["selector"]["matchLabels"]) == {"namespace", "service", "role"} for each in metrics)


def test_rules_and_dashboard_are_those_of_the_repository() -> None:
    """Guards against copies that grow old, and against metrics in them that do not exist."""
    objects = render("gpu")
    (rule,) = of_kind(objects, "PrometheusRule")
    assert rule["spec"] == yaml.safe_load((MONITORING / "alerts.yml").read_text())
    (dashboard,) = of_kind(objects, "ConfigMap")
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(dashboard["data"]["baton.json"]) == json.loads((MONITORING / "grafana.json").read_text())
    for group in rule["spec"]["groups"]:
        for each in group["rules"]:
            demand_known(each["expr"])
    panels = json.loads(dashboard["data"]["baton.json"])["panels"]
    for expression in (target["expr"] for panel in panels for target in panel.get("targets", [])):
        demand_known(expression)


@pytest.mark.parametrize(("example", "key"), [("gpu", True), ("keda", True), ("hpa", True)])
def test_prometheus_finds_the_proxies(example: str, key: bool) -> None:
    """Guards against a ServiceMonitor that selects nothing, has no key, or gives a job that the alerts do not know."""
    objects = render(example)
    (monitor,) = of_kind(objects, "ServiceMonitor")
    selected = [
        each
        for each in of_kind(objects, "Service")
        if matches(monitor["spec"]["selector"]["matchLabels"], each["metadata"]["labels"])
    ]
    (service,) = selected
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in {each["name"] for each in service["spec"]["ports"]}
    assert service["metadata"]["labels"][monitor["spec"]["jobLabel"]] == "baton"
    assert 'up{job="baton"}' in (MONITORING / "alerts.yml").read_text()
    assert ("authorization" in endpoint) == key
    without = of_kind(render(example, "apiKeys.enabled=false", "apiKeys.existingSecret="), "ServiceMonitor")[0]
    assert "authorization" not in without["spec"]["endpoints"][0]
