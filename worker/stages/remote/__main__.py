"""python -m baton.worker.stages.remote: a stage of a prefill worker whose first stage is on another host. It computes
what comes in until the worker ends.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path

import msgspec
import torch

from baton.kvtransfer.blocks.pool import BlockPool
from baton.kvtransfer.blocks.stage_pools import LayerMemory
from baton.kvtransfer.planes.zeromq import ZmqPlane
from baton.models.check import recipe_for
from baton.models.fallback.config import model_config
from baton.models.fingerprint import FingerprintTask
from baton.node.addresses import ListenHost, listen_host
from baton.node.credentials import link_credentials
from baton.node.errors import PeerLost, SettingsError
from baton.node.garbage import freeze_startup_objects
from baton.node.host import default_name
from baton.node.modelhub import locate_model
from baton.node.probe import NodeState, NoProbes, Probes, open_probes
from baton.node.settings import parse
from baton.node.sockets import Context
from baton.node.telemetry import configure_logging, log_event
from baton.worker.kv_layout import layout_of
from baton.worker.ranks.group import start_ranks
from baton.worker.ranks.loading import load_part, stage_of
from baton.worker.ranks.members import LOAD_S, pool_made
from baton.worker.stages.remote.adapters import GivenAdapters
from baton.worker.stages.remote.joining import FirstStageLink, NotAPart, summing
from baton.worker.stages.remote.messages import (
    MAX_TEXT,
    StageAssigned,
    StageLeaving,
    StageLoaded,
    StagePool,
    StageRefused,
)
from baton.worker.stages.remote.settings import StageSettings
from baton.worker.stages.work import Entering, work

logger = logging.getLogger("stage")


def main() -> int:
    settings = parse(StageSettings, sys.argv[1:], prog="baton stage", description="A stage of a prefill worker.")
    configure_logging(settings.log_level, "stage")
    try:
        host = listen_host(settings.bind, settings.advertise_host)
        own = link_credentials("stage", settings.secret_file, settings.insecure_network)
        to_decode = link_credentials("prefill", settings.secret_file, settings.insecure_network)
        folder = locate_model(settings.model, logger.info)
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        context, planes = Context(own), Context(to_decode)
        first = FirstStageLink(context, settings.first, default_name("stage"), settings.join_s)
        try:
            with open_probes(settings.probe_port, settings.bind) as probes:
                return _serve(settings, folder, first, planes, host, probes)
        finally:
            first.close()
            planes.close()
            context.close()
    except SettingsError as error:
        print(f"stage: {error}", file=sys.stderr)
        return 1


def _serve(
    settings: StageSettings,
    folder: Path,
    first: FirstStageLink,
    planes: Context,
    host: ListenHost,
    probes: Probes | NoProbes,
) -> int:
    """The exit status: 0 where the worker has ended as it should."""
    index = 0
    try:
        assigned = first.receive(StageAssigned, settings.join_s)
        index = assigned.model.stage
        configure_logging(settings.log_level, assigned.name)
        _compute(assigned, settings, folder, first, planes, host, probes)
    except SettingsError as error:
        first.send(StageRefused(reason=str(error)[:MAX_TEXT]))
        raise
    except NotAPart as error:
        raise SettingsError(f"--first {settings.first}: {error}") from None
    except PeerLost as error:
        log_event(logger, "stage_stopped", stage=index, reason=str(error))
    return 0 if first.ended else 1


def _compute(
    assigned: StageAssigned,
    settings: StageSettings,
    folder: Path,
    first: FirstStageLink,
    planes: Context,
    host: ListenHost,
    probes: Probes | NoProbes,
) -> None:
    """Ends with PeerLost."""
    part = msgspec.structs.replace(assigned.model, folder=str(folder))
    config = model_config(folder)
    if settings.threads is None and assigned.num_ranks > 1:  # torch's choice is all cores for each process
        torch.set_num_threads(max(1, torch.get_num_threads() // assigned.num_ranks))
    ranks, peers = start_ranks(part, assigned.num_ranks, assigned.name, settings.log_level, torch.get_num_threads())
    try:
        recipe = recipe_for(part.quantization, config)
        with FingerprintTask(folder, part.load_format, "cpu", recipe) as hashing:
            runner = load_part(part, peers)
            first.send(StageLoaded(fingerprint=hashing.result()))
        made = first.receive(StagePool, LOAD_S)
        layout = layout_of(runner.config, runner.kv_format, made.block_tokens, stage_of(part))
        pool = BlockPool(layout, made.num_blocks)
        runner.bind_pool(pool.tensor, pool.scales)
        ranks.share_pool(pool_made(pool))
        ranks.watch(lambda lost: first.steps.shut())
        adapters = GivenAdapters(runner.adapters)
        first.use(ZmqPlane(planes, LayerMemory(pool), made.end, host), pool, adapters)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: first.send(StageLeaving()))
        index, count = part.stage, part.num_stages
        log_event(logger, "stage_started", stage=index, of=count, layers=runner.num_kv_layers, pid=os.getpid())
        probes.watch(lambda: NodeState(first.turned_at, ""))
        freeze_startup_objects()
        is_last = index + 1 == count
        leaving = first.draws if is_last else first.steps
        work(runner, Entering(first.steps, count), leaving, is_last, summing(pool, first.send), adapters.fill)
    finally:
        ranks.close()


if __name__ == "__main__":
    sys.exit(main())
