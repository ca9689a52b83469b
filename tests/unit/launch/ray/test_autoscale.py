"""launch.ray.autoscale: from what the proxy asks for to the workers that a deployment has."""

from __future__ import annotations

from baton.launch.ray.autoscale import bounds_of, metrics_page, targets
from baton.launch.ray.settings import RaySettings
from baton.node.settings import parse

PAGE = """\
# HELP baton:desired_replicas Workers of the role.
baton:desired_replicas{model_name="demo",role="prefill"} 0.0
baton:desired_replicas{model_name="demo",role="decode"} 7.0
baton:slo_saturation{model_name="demo",role="decode"} 2.0
"""


def test_only_roles_with_bounds_are_scaled() -> None:
    assert bounds_of(RaySettings(prefill=1, decode=2)) == {}
    assert bounds_of(RaySettings(prefill=1, decode=2, max_prefill=1, max_decode=3)) == {"decode": (2, 3)}


def test_the_bounds_hold() -> None:
    """Guards the cluster's other users from a model that misses its objective whatever it gets, and a start before the
    first worker has joined: nothing is desired yet."""
    assert targets(PAGE, {"prefill": (1, 4), "decode": (2, 5)}) == {"prefill": 1, "decode": 5}
    assert targets("", {"decode": (2, 5)}) == {}


def test_no_answer_changes_nothing() -> None:
    assert metrics_page("127.0.0.1", 1, "", tls=False) == ""


def test_the_options_are_those_of_a_command_line() -> None:
    assert parse(RaySettings, ["--max-decode", "4"], "x", "x", {}).max_decode == 4
