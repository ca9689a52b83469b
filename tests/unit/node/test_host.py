"""node.host: names of nodes that were given none."""

from __future__ import annotations

import os
import platform

import pytest

from baton.node.host import default_name
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
