"""python -m baton.worker.ranks FD: a rank of a worker other than rank 0. It joins steps until rank 0 ends.

FD: the open end of a link to rank 0, which says what to do. Not started by hand.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence

import torch

from baton.launch.supervisor import tether
from baton.models.partition import Rank
from baton.node.errors import InvariantBroken, PeerLost, SettingsError
from baton.node.garbage import freeze_startup_objects
from baton.node.telemetry import configure_logging, log_event
from baton.worker.ranks.ending import RankEnding
from baton.worker.ranks.exchange import ProcessPeers
from baton.worker.ranks.links import RankLink
from baton.worker.ranks.loading import bind_pool, load_part, mapped
from baton.worker.ranks.members import LOAD_S, beat
from baton.worker.ranks.messages import PoolMade, RankReady, RankStart, decode, encode

START_S = 60.0

logger = logging.getLogger("rank")


def main(argv: Sequence[str]) -> int:
    control = RankLink.inherited(0, int(argv[0]))
    for number in (signal.SIGINT, signal.SIGTERM):  # for rank 0, whose requests get to their end
        signal.signal(number, signal.SIG_IGN)
    start = decode(control.receive(START_S))
    if not isinstance(start, RankStart):
        raise InvariantBroken(f"{type(start).__name__} before a rank knows what it is")
    if (tie := tether(start.starter_pid)) is not None:
        tie()
    configure_logging(start.log_level, start.name)
    torch.set_num_threads(start.threads)
    links = [RankLink.inherited(other, fd) for other, fd in start.peer_fds.items()]
    memory = torch.frombuffer(mapped(start.starter_pid, start.memory).view, dtype=torch.uint8)
    peers = ProcessPeers(Rank(start.index, start.count), start.model.vocab_size, memory, links)
    ending = RankEnding(start.index)
    try:
        if start.device is None:
            join = _load(start, peers, control)
        else:
            join, ending.give_up = _load_on_device(start, peers, control)
        control.send(encode(RankReady()))
        threading.Thread(target=beat, args=((control,),), name="beat", daemon=True).start()
        if start.device is not None:
            ending.follow(control)
        log_event(logger, "rank_started", rank=start.index, of=start.count, pid=os.getpid())
        freeze_startup_objects()
        while True:
            join()
    except SettingsError as error:
        print(f"{start.name}: {error}", file=sys.stderr)
        return 1
    except PeerLost as error:
        ending.end(str(error), 0)
    except Exception as error:
        traceback.print_exc()
        ending.end(repr(error), 1)


def _load_on_device(
    start: RankStart, peers: ProcessPeers, control: RankLink
) -> tuple[Callable[[], None], Callable[[], None]]:
    """The same on a GPU, and what ends waits for other ranks there; needs CUDA and triton."""
    from baton.worker.ranks.device import join_on_device

    return join_on_device(start, peers, control, LOAD_S)


def _load(start: RankStart, peers: ProcessPeers, control: RankLink) -> Callable[[], None]:
    """This rank's part of the model over the pool of all ranks; what it gives is called for each step."""
    runner = load_part(start.model, peers)
    made = decode(control.receive(LOAD_S))
    if not isinstance(made, PoolMade):
        raise InvariantBroken(f"{type(made).__name__} before a rank has a pool")
    bind_pool(runner, start.model, made)
    return lambda: runner.join(peers.begun())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
