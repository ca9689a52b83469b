"""A decode worker of two ranks loses one of them while streams run: it ends, and another worker takes the streams over.

With one GPU all three processes are on it. Steps are paced, so that streams last long enough to meet the fault. Prints
what was measured as a JSON line (pytest -s). Run it in a separate process, as tests/gpu/test_runner.py says.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.benchmark.cluster.completions import random_ids
from baton.benchmark.cluster.running import metrics, running
from baton.kernels.triton.rank_words import GIVE_UP_NS
from baton.launch.cluster import Cluster
from baton.launch.local import ServeSettings
from baton.launch.supervisor import ChildSpec
from baton.tests.gpu.test_rank_processes import TWO_GPUS, WORKER
from baton.worker.ranks.members import STOP_S

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]

NAME = "decode-1"
"""The worker of two ranks; decode-0 has one."""
RANKS = ("--tp=2",) if TWO_GPUS else ("--tp=2", "--rank-gpus", "0", "0")
PACE_S = 0.01
MAX_TOKENS, BEGUN = 200 if TWO_GPUS else 60, 5
LENGTHS = (3, 64, 65, 130, 17, 200)
END_S, POLL_S = 30.0, 0.02


class Reading:
    """One stream, read by a thread."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        self.tokens: list[int] = []
        self.finish, self.error = "", ""
        self._thread = threading.Thread(target=self._read, args=(f"{url}/v1/completions", body), daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def answer(self) -> list[int]:
        """All tokens, of a stream that ends as it should."""
        self._thread.join(END_S)
        assert self.ended, f"no end after {len(self.tokens)} tokens"
        assert (self.error, self.finish, len(self.tokens)) == ("", "length", MAX_TOKENS)
        return self.tokens

    def _read(self, url: str, body: dict[str, Any]) -> None:
        try:
            with httpx.stream("POST", url, json=body, timeout=END_S) as answer:
                if answer.status_code != 200:
                    self.error = answer.read().decode()
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        self._take(json.loads(line.removeprefix("data: ")))
        except httpx.HTTPError as error:
            self.error = repr(error)

    def _take(self, chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            self.error = str(chunk["error"])
        for choice in chunk.get("choices", ()):
            self.tokens += choice.get("token_ids") or ()
            self.finish = choice["finish_reason"] or self.finish


def begin(cluster: Cluster, case: int) -> list[Reading]:
    """Streams of prompts that no other case has, every other one greedy."""
    fields = {"model": cluster.model, "max_tokens": MAX_TOKENS, "ignore_eos": True, "stream": True, "top_p": 1.0}
    return [
        Reading(
            cluster.url,
            fields
            | {"prompt": random_ids(length, case, number), "seed": number, "temperature": number % 2 * 0.8}
            | {"return_token_ids": True},
        )
        for number, length in enumerate(LENGTHS)
    ]


def edit(spec: ChildSpec) -> ChildSpec:
    """Workers whose steps are paced, one of them of two ranks."""
    if spec.group != "decode":
        return spec
    paced = (*spec.argv[:3], "baton.testing.paced_worker", "decode", str(PACE_S), *spec.argv[4:])
    return replace(spec, argv=(*paced, *(RANKS if spec.name == NAME else ())))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    settings = ServeSettings(
        model="demo",
        prefill=0,
        decode=2,
        device="cuda",
        gpus=(0,),
        store_ram_gib=0.0,
        worker_arg=WORKER,
        start_timeout_s=150.0,
    )
    with running(settings, edit=edit) as (cluster, took_s):
        print(json.dumps({"start_s": round(took_s, 1)}), file=sys.stderr)
        yield cluster
        assert not cluster.stop(), "each node ends in order, the ranks of a new worker too, and no block is lost"


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + END_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(POLL_S)


def living(is_meant: Callable[[int, int], bool]) -> list[int]:
    """Processes that run or are stopped; is_meant: by process and its group."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, _, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state not in "ZX" and is_meant(int(entry.name), int(group)):
            found.append(int(entry.name))
    return found


@contextmanager
def shown_log(cluster: Cluster) -> Iterator[Callable[[], str]]:
    """What the worker logs inside the block, which is shown where that fails."""
    begin = len(cluster.log(NAME))
    try:
        yield lambda: cluster.log(NAME)[begin:]
    except BaseException:
        print(cluster.log(NAME)[begin:][-6000:])
        raise


@pytest.mark.parametrize(
    ("rank", "fault"),
    [(1, signal.SIGKILL), (1, signal.SIGSTOP), (0, signal.SIGSTOP)],
    ids=["rank-1-killed", "rank-1-stopped", "rank-0-stopped"],
)
def test_streams_outlive_a_worker_that_loses_a_rank(cluster: Cluster, rank: int, fault: signal.Signals) -> None:
    """Guards against kernels that wait for a rank that is gone, and hold up their process, the GPU and its streams; and
    against a rank's process that stays."""
    cluster.revive()
    case, worker = 2 * rank + (fault == signal.SIGSTOP), cluster.pid(NAME)
    other = int(re.findall(r"rank_started rank=1 of=2 pid=(\d+)", cluster.log(NAME))[-1])
    retries = metrics(cluster).total("baton:retries_total")
    with shown_log(cluster) as log:
        streams = begin(cluster, case)
        until(
            lambda: (
                metrics(cluster, 0.0).total("baton:worker_running", worker=NAME) > 0
                and all(len(each.tokens) >= BEGUN or each.error for each in streams)
            ),
            "streams of both workers",
        )
        assert not any(each.ended for each in streams), [each.error for each in streams]
        at = time.monotonic()
        os.kill(other if rank else worker, fault)
        if rank:
            assert cluster.wait_end(NAME, END_S), "its launcher starts it again"
        else:
            until(lambda: not living(lambda pid, _: pid == other), "the end of rank 1")
        noticed_s = time.monotonic() - at
        answers = [each.answer() for each in streams]
        answered_s = time.monotonic() - at
        if not rank:
            cluster.resume(NAME)
            assert cluster.wait_end(NAME, END_S), "a worker without a rank does not go on"
        until(lambda: not living(lambda pid, group: pid == other or group == worker), "the end of all its processes")
        if fault == signal.SIGSTOP:
            assert f"rank {rank} does not answer" in log(), "found by its process"
            assert not rank or noticed_s < GIVE_UP_NS / 1e9 + STOP_S, "kernels were ended by it, not by the GPU's clock"
        assert metrics(cluster).total("baton:retries_total") > retries, "the worker had streams"
        seconds = {"ended_s": round(noticed_s, 2), "streams_s": round(answered_s, 2)}
        print(json.dumps({"fault": f"{fault.name} of rank {rank}"} | seconds))
        cluster.revive()
        assert [each.answer() for each in begin(cluster, case)] == answers, "tokens without the fault"
