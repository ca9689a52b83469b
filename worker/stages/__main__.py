"""python -m baton.worker.stages FD: a stage of a prefill worker after the first. It computes what comes in until the
worker ends.

FD: the open end of a link to the first stage, which says what to do. Not started by hand.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from functools import partial

import torch

from baton.launch.supervisor import tether
from baton.node.errors import InvariantBroken, PeerLost, SettingsError
from baton.node.garbage import freeze_startup_objects
from baton.node.telemetry import configure_logging, log_event
from baton.worker.ranks.group import start_ranks
from baton.worker.ranks.links import RankLink
from baton.worker.ranks.loading import bind_pool, load_part
from baton.worker.ranks.members import LOAD_S, beat
from baton.worker.ranks.messages import PoolMade, RankReady, StageStart, decode, encode
from baton.worker.stages.adapters import fill_as_first
from baton.worker.stages.links import StageLink
from baton.worker.stages.work import Entering, work

START_S = 60.0

logger = logging.getLogger("stage")


def main(argv: Sequence[str]) -> int:
    control = RankLink.inherited(0, int(argv[0]), "stage")
    for number in (signal.SIGINT, signal.SIGTERM):  # for the first stage, whose requests get to their end
        signal.signal(number, signal.SIG_IGN)
    start = decode(control.receive(START_S))
    if not isinstance(start, StageStart):
        raise InvariantBroken(f"{type(start).__name__} before a stage knows what it is")
    if (tie := tether(start.starter_pid)) is not None:
        tie()
    configure_logging(start.log_level, start.name)
    torch.set_num_threads(start.threads)
    index, count = start.model.stage, start.model.num_stages
    before = StageLink.inherited(f"stage {index - 1}", start.entering_fd)
    after = StageLink.inherited(f"stage {(index + 1) % count}", start.leaving_fd)
    try:
        if start.device is None:
            _compute(start, control, before, after)
        else:
            _compute_on_gpu(start, control, before, after)
    except SettingsError as error:
        print(f"{start.name}: {error}", file=sys.stderr)
        return 1
    except PeerLost as error:
        log_event(logger, "stage_stopped", stage=index, reason=str(error))
    return 0


def _compute(start: StageStart, control: RankLink, before: StageLink, after: StageLink) -> None:
    """Load the stage, and compute what enters it until PeerLost."""
    index, count = start.model.stage, start.model.num_stages
    ranks, peers = start_ranks(start.model, start.num_ranks, start.name, start.log_level, start.threads)
    try:
        runner = load_part(start.model, peers)
        made = decode(control.receive(LOAD_S))
        if not isinstance(made, PoolMade):
            raise InvariantBroken(f"{type(made).__name__} before a stage has a pool")
        bind_pool(runner, start.model, made)
        ranks.share_pool(made)
        ranks.watch(lambda lost: before.shut())
        _say_ready(start, control, runner.num_kv_layers)
        fill = partial(fill_as_first, runner.adapters)
        work(runner, Entering(before, count), after, index + 1 == count, on_filled=fill)
    finally:
        ranks.close()


def _compute_on_gpu(start: StageStart, control: RankLink, before: StageLink, after: StageLink) -> None:
    """The same, on a GPU; needs CUDA and triton."""
    from baton.worker.stages.device import join_on_device

    stage = join_on_device(start, control, LOAD_S)
    _say_ready(start, control, stage.layout.num_layers)
    stage.work(before, after)


def _say_ready(start: StageStart, control: RankLink, num_layers: int) -> None:
    control.send(encode(RankReady()))
    threading.Thread(target=beat, args=((control,),), name="beat", daemon=True).start()
    index, count = start.model.stage, start.model.num_stages
    log_event(logger, "stage_started", stage=index, of=count, layers=num_layers, pid=os.getpid())
    freeze_startup_objects()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
