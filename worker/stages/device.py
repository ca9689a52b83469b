"""A stage of a worker on its GPU: its layers, and the steps that it computes.

The first stage's process owns the pools of all stages, each on the GPU of its stage, and so has all transfers and
digests. Needs CUDA and triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from baton.kvtransfer.blocks.device_pool import mapped
from baton.kvtransfer.blocks.device_stage_pools import stage_layouts
from baton.kvtransfer.blocks.layout import KVLayout
from baton.kvtransfer.blocks.views import KvTensors, kv_tensors
from baton.kvtransfer.reshard import Cut
from baton.models.config import ModelConfig
from baton.models.cuda.queue import CudaQueue
from baton.models.cuda.residuals import ResidualSlots
from baton.models.cuda.runner import CudaRunner
from baton.models.cuda.stage import AdvancingStage
from baton.models.kv_scales import kv_format_of
from baton.models.partition import Stage, check_stages
from baton.models.weights import Progress, no_progress
from baton.node.errors import InvariantBroken
from baton.worker.ranks.device_loading import (
    DTYPES,
    config_of,
    device_layout,
    limits_of,
    load_on_gpu,
    padding_of,
    room_for_blocks,
)
from baton.worker.ranks.links import RankLink
from baton.worker.ranks.loading import stage_of
from baton.worker.ranks.messages import (
    DeviceShare,
    DeviceStageLoaded,
    DeviceStagePool,
    ModelPart,
    StageStart,
    decode,
    encode,
)
from baton.worker.stages.late import EnteringSteps, Leaving, advance_late, draw_late
from baton.worker.stages.links import StageLink
from baton.worker.stages.residual_memory import locked_slots
from baton.worker.stages.work import Entering


@dataclass(frozen=True, slots=True)
class DeviceStage:
    """One stage's part of a model on its GPU."""

    stage: Stage
    share: DeviceShare
    config: ModelConfig
    runner: AdvancingStage | CudaRunner
    """The latter is the last one."""
    entering: tuple[torch.Tensor, ...]
    """Slots of memory; of the first stage none."""
    whole_layout: KVLayout
    """Of all stages together."""
    weights_bytes: int
    longest: int

    @classmethod
    def load(
        cls, part: ModelPart, share: DeviceShare, starter_pid: int, on_progress: Progress = no_progress
    ) -> DeviceStage:
        """SettingsError for what cannot run. starter_pid: whose memory steps pass."""
        torch.cuda.set_device(share.gpu)
        stage, (config, longest) = stage_of(part), config_of(part)
        check_stages(config, stage.count)
        weights = load_on_gpu(part, config, share.gpu, on_progress, stage=stage)
        dtype = DTYPES[part.dtype]
        kv_format = kv_format_of(part.kv_dtype, config, Path(part.folder), dtype, part.load_format)
        limits = limits_of(share, part)
        slots = ResidualSlots.of(limits, config.hidden_size, dtype)
        entering, leaving = (
            () if memory is None else locked_slots(starter_pid, memory, slots)
            for memory in (share.entering, share.leaving)
        )
        given = config, weights, CudaQueue(share.gpu), limits, longest
        runner: AdvancingStage | CudaRunner
        if stage.is_last:
            runner = CudaRunner(*given, kv_format=kv_format, stage=stage)
        else:
            runner = AdvancingStage(*given, stage, kv_format=kv_format, leaving=leaving)
        layout = device_layout(config, kv_format, share.block_tokens)
        return cls(stage, share, config, runner, entering, layout, sum(weights.size_bytes.values()), longest)

    @property
    def cut(self) -> Cut:
        """Of the model's KV."""
        layout = self.whole_layout
        return Cut.even(layout.num_units, 1, layout.num_layers, self.stage.count)

    @property
    def layout(self) -> KVLayout:
        """Of this stage's pool."""
        return stage_layouts(self.cut, self.whole_layout, padding_of)[self.stage.index]

    @property
    def num_blocks(self) -> int:
        """For which this GPU has room, beside the contexts of this process and of the first stage's; 0: they are
        given."""
        return room_for_blocks(self.share, self.layout.block_bytes, 0, is_worker=self.stage.is_first)

    def bind(self, tensors: KvTensors, max_model_len: int) -> None:
        """Steps use this pool, and are captured."""
        self.runner.bind_pool(tensors.data, max_model_len, scales=tensors.scales)
        self.runner.warm_up()

    def use_gpu(self) -> None:
        """In this thread; else waiting for steps would make a context on the first GPU."""
        torch.cuda.set_device(self.share.gpu)

    def work(self, before: StageLink, after: StageLink) -> None:
        """Of a stage behind the first. Ends with PeerLost."""
        entering = EnteringSteps(Entering(before, self.runner.run_ahead + 1), self.entering)
        leaving = Leaving(after, self.use_gpu, before.shut)
        if isinstance(self.runner, AdvancingStage):
            advance_late(self.runner, entering, leaving)
        draw_late(self.runner, entering, leaving, after)


def join_on_device(start: StageStart, control: RankLink, load_s: float) -> DeviceStage:
    """Load a stage behind the first, and make it ready."""
    if start.device is None:
        raise InvariantBroken("a stage on a GPU without its share of one")
    loaded = DeviceStage.load(start.model, start.device, start.starter_pid)
    control.send(encode(DeviceStageLoaded(num_blocks=loaded.num_blocks)))
    made = decode(control.receive(load_s))
    if not isinstance(made, DeviceStagePool):
        raise InvariantBroken(f"{type(made).__name__} before a stage has a pool")
    memory = mapped(made.pool, made.num_blocks * loaded.layout.block_bytes, loaded.share.gpu)
    loaded.bind(kv_tensors(memory, loaded.layout, made.num_blocks), made.max_model_len)
    return loaded
