"""node.host: names of nodes that were given none, and the limit of open files."""

from __future__ import annotations

import os
import platform
import resource

import pytest

from baton.node.host import allow_files, default_name
from baton.node.membership import name_error


@pytest.mark.parametrize("host", ["3f2a9c1d7e55", "gpu-node-1.example.com", "x" * 64, "", "größe_1"])
def test_nodes_of_two_containers_have_two_names(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards two workers that are each process 1 of their container: of one name, each would replace the other at the
    proxy, again and again."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    monkeypatch.setattr(platform, "node", lambda: host)
    name = default_name("decode")
    assert not name_error(name) and name.startswith("decode-") and name.endswith("-1")
    monkeypatch.setattr(platform, "node", lambda: "0" + host)
    assert default_name("decode") != name or len(host) > 40


@pytest.mark.parametrize(
    "soft, hard, wanted, limit",
    [
        (64, 256, 100, 100),
        (64, 256, 1000, 256),
        (64, resource.RLIM_INFINITY, 1000, 1000),
        (1000, 2000, 100, 1000),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 1000, resource.RLIM_INFINITY),
    ],
)
def test_a_node_opens_as_many_files_as_it_needs_and_the_system_permits(
    soft: int, hard: int, wanted: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards a worker of many peers under the limit that systems start processes with, and a larger limit that was
    given to it."""
    limits = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: limits.append(pair))
    may = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    assert allow_files(wanted) == may
    assert limits[-1] == (limit, hard)
