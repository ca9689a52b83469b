"""Guards the proxy's start: what is an error there, and what only a warning."""

from __future__ import annotations

import logging
import resource
import sys

import pytest

from baton.node.errors import SettingsError
from baton.proxy.__main__ import _max_connections, _spans
from baton.proxy.metrics.request_log import NoSpans
from baton.proxy.routing.cluster import MAX_STORES, MAX_WORKERS
from baton.proxy.settings import ProxySettings

VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"


@pytest.mark.parametrize("endpoint", ["http://collector:4318", "collector:4317"])
def test_traces_that_only_the_environment_asks_for_are_a_warning(
    endpoint: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Platforms set the variable for all processes: a server without the extra, which was not asked for traces, did not
    start. On the command line it is an error still, as the user would wait for traces in vain."""
    monkeypatch.setitem(sys.modules, "baton.proxy.metrics.spans", None)  # an import of it fails, as without the extra
    monkeypatch.setenv(VARIABLE, endpoint)
    assert isinstance(_spans(endpoint), NoSpans)
    assert [(record.levelno, "baton-serve[otel]" in record.message) for record in caplog.records] == [
        (logging.WARNING, True)
    ]
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(SettingsError, match=r"--otlp-endpoint needs OpenTelemetry: install baton-serve\[otel\]"):
        _spans(endpoint)


@pytest.mark.parametrize("namespace", ["demo", "12c654f6d59", "0" * 65, "12c654f6d590\n"])
def test_a_namespace_is_hex_digits(namespace: str) -> None:
    """Guards against a proxy that refuses every worker because of a misspelt option."""
    with pytest.raises(SettingsError, match="12 to 64 hex digits"):
        ProxySettings(namespace=(namespace,))
    assert ProxySettings(namespace=("12C654f6d590",)).namespace


@pytest.mark.parametrize(
    "hard, connections, others",
    [(1 << 20, 2304, MAX_WORKERS + MAX_STORES), (1024, 896, 128), (64, 1, 63)],
)
def test_clients_leave_files_for_the_workers(
    hard: int, connections: int, others: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against connections that are reset because clients and workers need more files than the limit was raised
    to; where the system allows no more, clients have fewer connections and are answered."""
    limits = [(64, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: limits.append(pair))
    assert _max_connections(1024) == connections
    assert limits[-1][0] - connections >= others
