"""A worker on a GPU with too little memory: it gives the reason before it starts, and frees the GPU."""

from __future__ import annotations

import pytest
import torch

from baton.decode.settings import DecodeSettings
from baton.node.errors import SettingsError
from baton.worker.build_cpu import load_model

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"kv_memory_gib": 4000.0}, "does not fit"),
        ({"gpu_memory_utilization": 0.01}, "no memory for a KV pool"),
        ({"max_num_batched_tokens": 1 << 20, "max_num_seqs": 4096, "taken": 0.97}, "does not suffice"),
    ],
    ids=["pool", "too small a share", "activations"],
)
def test_too_little_memory_is_an_error_at_startup(options, reason):
    """Guards against a traceback, and against memory that stays allocated after the error."""
    from baton.node.modelhub import locate_model

    free, total = torch.cuda.mem_get_info(0)
    hold_bytes = int(options.pop("taken", 0.0) * total) - (total - free)
    held = torch.empty(max(0, hold_bytes), dtype=torch.uint8, device="cuda:0")
    settings = DecodeSettings(**options)
    with pytest.raises(SettingsError, match=reason):
        load_model(settings, settings.worker_sizes("cuda"), "cuda", "decode", locate_model("demo"))
    del held
    torch.cuda.empty_cache()
    assert torch.zeros(1 << 20, device="cuda:0").sum().item() == 0.0
