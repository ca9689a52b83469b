"""Loads a model that is not native through transformers. Code of a folder is never run, and nothing is unpickled."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from baton.kernels import PlainKv
from baton.models.batch import Row
from baton.models.config import ModelConfig
from baton.models.cpu.attention import PagedAttention
from baton.models.cpu.step_batch import lay_out
from baton.models.fallback.admission import compare, expect, named_refusals, observe
from baton.models.fallback.attention import NAME, register
from baton.models.fallback.decoder import FallbackDecoder
from baton.models.fingerprint import DUMMY_SEED
from baton.node.errors import SettingsError
from baton.node.telemetry import excerpt, log_event

logger = logging.getLogger("weights")

TRIAL_TOKENS = 24


def load_fallback(
    config: ModelConfig, folder: Path, dtype: torch.dtype, load_format: str
) -> tuple[ModelConfig, FallbackDecoder]:
    """The model on the CPU, once it has passed the trial; SettingsError for what cannot be loaded or served."""
    model = load_model(config, folder, dtype, load_format, "cpu")
    with named_refusals(config):
        config, calls, value_dim = observe(config, model)
        decoder = FallbackDecoder(model, calls, value_dim)
        compare(config, _CpuTrial(config, decoder, dtype), expect(config, model, TRIAL_TOKENS))
    log_slower_way(config)
    return config, decoder


def log_slower_way(config: ModelConfig, **more: str | int) -> None:
    log_event(
        logger,
        "model_through_transformers",
        level=logging.WARNING,
        architecture=config.architecture,
        library=config.through,
        why="no native code runs it; this is the slower way",
        **more,
    )


def load_model(config: ModelConfig, folder: Path, dtype: torch.dtype, load_format: str, device: str) -> PreTrainedModel:
    """SettingsError for what the library cannot load."""
    register()
    try:
        model = _load(folder, dtype, load_format, device).eval()
    except (SettingsError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the library's code for some family makes of the folder
        raise SettingsError(f"{folder}: transformers cannot load {config.architecture}: {excerpt(error)}") from None
    with suppress(Exception):  # of some families it must be a number
        model.config.pad_token_id = None  # each step would look for it, to warn, and wait for a GPU
    return model


def _load(folder: Path, dtype: torch.dtype, load_format: str, device: str) -> PreTrainedModel:
    described = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if load_format == "dummy":
        torch.manual_seed(DUMMY_SEED)
        with torch.device(device):
            return AutoModelForCausalLM.from_config(
                described, dtype=dtype, attn_implementation=NAME, trust_remote_code=False
            )
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        config=described,
        dtype=dtype,
        attn_implementation=NAME,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
    )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):  # the library would draw them at random
        raise SettingsError(f"{folder}: tensor {missing[0]} is missing ({len(missing)} are)")
    return model.to(device)


class _CpuTrial:
    """The Trial of a decoder on the CPU."""

    block_tokens = 8

    def __init__(self, config: ModelConfig, decoder: FallbackDecoder, dtype: torch.dtype) -> None:
        self._decoder, self._window, self._dtype = decoder, config.sliding_window, dtype
        blocks = 2 * -(-TRIAL_TOKENS // self.block_tokens)
        shape = (blocks, config.num_kv_heads, config.num_layers, 2, self.block_tokens, config.head_dim)
        self._attention = PagedAttention(
            config, PlainKv(torch.zeros(shape, dtype=dtype)), self.block_tokens, dtype.itemsize
        )

    def logits(self, rows: Sequence[Row]) -> torch.Tensor:
        return self._decoder(self._attention, lay_out(rows, self._attention.shape, self._window, self._dtype))
