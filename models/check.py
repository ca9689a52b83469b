"""python -m baton.models.check FOLDER LOAD_FORMAT MAX_MODEL_LEN QUANTIZATION TP SPECULATE PP: whether a worker can
serve a folder, with the draft that it may name.

No torch. Reads configuration files and the headers of the weights, so it takes a moment. An error is one line and
status 2. Empty arguments are a worker's defaults.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from baton.models.checkpoint import Checkpoint
from baton.models.config import ModelConfig
from baton.models.eagle_config import EAGLE, read_eagle
from baton.models.fallback.config import model_config
from baton.models.partition import check_partition, check_stages
from baton.models.quantization.recipe import Recipe, recipe_of
from baton.node.errors import SettingsError


def check(
    folder: Path,
    load_format: str,
    max_model_len: int | None,
    quantization: str | None = None,
    num_ranks: int = 1,
    draft: Path | None = None,
    num_stages: int = 1,
) -> None:
    """Raises SettingsError for an unsupported model, weights that are missing, cut off or quantised twice, a context
    too long, ranks or stages that cannot share the model, and a draft of another one."""
    config = model_config(folder)
    longest_known(max_model_len, config)
    recipe_for(quantization, config)
    check_partition(config, num_ranks)
    check_stages(config, num_stages)
    if draft is not None:
        read_eagle(draft, config)
    if load_format != "dummy":
        for each in (folder, draft):
            if each is not None:
                Checkpoint.open(each)


def check_adapters(config: ModelConfig) -> None:
    """SettingsError for a model that takes no adapters."""
    if config.through:
        raise SettingsError(f"--max-loras: {config.architecture} runs through transformers, without adapters")


def recipe_for(quantization: str | None, config: ModelConfig) -> Recipe | None:
    """Of the setting; SettingsError if it does not fit the model."""
    if quantization is not None and config.through:
        raise SettingsError(
            f"--quantization {quantization}: {config.architecture} runs through transformers, unquantised"
        )
    return recipe_of(quantization, config.quantization.method if config.quantization is not None else None)


def longest_known(max_model_len: int | None, config: ModelConfig) -> int:
    """The longest sequence that the model knows, or the setting if that is shorter."""
    known = config.max_model_len
    if max_model_len is None:
        return known
    if max_model_len > known:
        raise SettingsError(f"--max-model-len {max_model_len}: the model's positions end at {known}")
    return max_model_len


def main(argv: Sequence[str]) -> int:
    folder, load_format, max_model_len, quantization, num_ranks, speculate, num_stages = argv
    draft = Path(speculate.removeprefix(EAGLE)).expanduser() if speculate.startswith(EAGLE) else None
    try:
        # What is no number is the worker's own error of settings.
        check(
            Path(folder),
            load_format,
            int(max_model_len) if max_model_len.isdecimal() else None,
            quantization or None,
            int(num_ranks) if num_ranks.isdecimal() else 1,
            draft if draft is not None and draft.is_dir() else None,  # a hub id is the worker's part
            int(num_stages) if num_stages.isdecimal() else 1,
        )
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
