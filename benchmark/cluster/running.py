"""A cluster under measurement: the model that it serves, its start, its metrics, and its stop on every way out.

How its processes are started and watched is launch/cluster.py's; what is sent to it is the benchmark's.
"""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from baton.benchmark.cluster.metrics import MetricsPage
from baton.benchmark.harness.errors import BenchmarkFailed
from baton.benchmark.harness.shapes import block_bytes, make_model
from baton.launch.cluster import Cluster, ClusterError
from baton.launch.local import ServeSettings
from baton.launch.supervisor import ChildSpec
from baton.node.modelhub import DEMO_MODEL, locate_model

HEARTBEATS_S = 0.8
"""What workers have counted is in the proxy's metrics by then."""
POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a benchmark serves, and the blocks of its KV."""

    name: str
    """For `--model`: the demo model, or a folder."""
    worker_args: tuple[str, ...]
    block_tokens: int
    block_bytes: int


@contextmanager
def served_model(options: argparse.Namespace, tokenizer: Path | None = None) -> Iterator[ServedModel]:
    """On CPU the demo model, on a GPU random weights of `--shape` and `--layers`; `tokenizer` as in `make_model`."""
    if options.device == "cpu":
        yield ServedModel(DEMO_MODEL, (), 16, block_bytes(locate_model(DEMO_MODEL), 16, dtype_bytes=4))
        return
    with TemporaryDirectory() as parent:
        folder = make_model(options.shape, Path(parent) / options.shape, tokenizer, options.layers)
        yield ServedModel(str(folder), ("--load-format=dummy",), 64, block_bytes(folder, 64, dtype_bytes=2))


@contextmanager
def running(
    settings: ServeSettings,
    *,
    edit: Callable[[ChildSpec], ChildSpec] = lambda spec: spec,
    environ: Mapping[str, str] | None = None,
) -> Iterator[tuple[Cluster, float]]:
    """A cluster that answers, and the seconds of its start. Raises BenchmarkFailed where a process of it ends."""
    cluster = Cluster(settings, edit=edit, environ=environ)
    try:
        yield cluster, cluster.start()
    except ClusterError as error:
        raise BenchmarkFailed(str(error)) from error
    finally:
        handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is ending, and must not leave a process behind
        cluster.stop()
        signal.signal(signal.SIGTERM, handler)


def metrics(cluster: Cluster, settle_s: float = HEARTBEATS_S) -> MetricsPage:
    """As they are now: what was counted before the call is in them."""
    time.sleep(settle_s)
    status, text = cluster.get("/metrics")
    if status != 200:
        raise BenchmarkFailed(f"no metrics: HTTP {status}")
    return MetricsPage(text)


def wait_metrics(cluster: Cluster, condition: Callable[[MetricsPage], bool], timeout_s: float) -> bool:
    """Whether the condition held in time."""
    deadline = time.monotonic() + timeout_s
    while not condition(metrics(cluster, 0.0)):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def restart_all(cluster: Cluster, names: Sequence[str]) -> None:
    """Kill these workers at once, start others in their place, and wait until the cluster answers again."""
    for name in names:
        cluster.kill(name)
    timeout_s = cluster.settings.start_timeout_s
    cluster.wait_until(lambda: not cluster.members() & set(names), f"{', '.join(names)} gone", timeout_s)
    for name in names:
        cluster.start_node(name)
    cluster.wait_ready()
