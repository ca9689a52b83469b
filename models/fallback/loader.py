"""Loads a model that is not native through transformers. Code of a folder is never run, and nothing is unpickled."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from baton.models.config import ModelConfig
from baton.models.fallback.admission import admit
from baton.models.fallback.attention import NAME, register
from baton.models.fallback.decoder import FallbackDecoder
from baton.models.fingerprint import DUMMY_SEED
from baton.node.errors import SettingsError
from baton.node.telemetry import excerpt, log_event

logger = logging.getLogger("weights")


def load_fallback(
    config: ModelConfig, folder: Path, dtype: torch.dtype, load_format: str
) -> tuple[ModelConfig, FallbackDecoder]:
    """The model, once it has passed the trial; SettingsError for what cannot be loaded or served."""
    register()
    try:
        model = _load(folder, dtype, load_format)
    except SettingsError:
        raise
    except Exception as error:  # whatever the library's code for some family makes of the folder
        raise SettingsError(f"{folder}: transformers cannot load {config.architecture}: {excerpt(error)}") from None
    config, decoder = admit(config, model.eval(), dtype)
    log_event(
        logger,
        "model_through_transformers",
        level=logging.WARNING,
        architecture=config.architecture,
        library=config.through,
        why="no native code runs it; this is the slower way",
    )
    return config, decoder


def _load(folder: Path, dtype: torch.dtype, load_format: str) -> PreTrainedModel:
    described = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if load_format == "dummy":
        torch.manual_seed(DUMMY_SEED)
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
    return model
