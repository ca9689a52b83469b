"""worker.startup: what a worker derives from its model before it joins: longest sequence, namespace, pool, planes."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest
import torch

from baton.decode.settings import DecodeSettings
from baton.models.batch import Draw, Row
from baton.models.config import ModelConfig
from baton.models.fingerprint import model_fingerprint
from baton.models.kv_format import KvFormat
from baton.node.errors import SettingsError
from baton.node.messages.control import SamplingSpec
from baton.node.modelhub import locate_model
from baton.prefill.settings import PrefillSettings
from baton.worker.build_cpu import checked_planes, choose_device, load_model, longest_known, pool_blocks
from baton.worker.kv_layout import layout_of
from baton.worker.main import serve
from baton.worker.startup import namespace_of, start

PLAIN = KvFormat.plain(torch.float32)
SHAPE = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def folder_of(path: Path, **fields: object) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(SHAPE | fields))
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.mark.parametrize(
    ("fields", "longest"),
    [
        ({}, 32768),
        ({"rope_scaling": YARN}, 131072),  # as the model cards of Qwen2.5 and Qwen3 recommend
        ({"rope_scaling": YARN, "max_position_embeddings": 163840}, 163840),
        ({"rope_scaling": LLAMA3, "max_position_embeddings": 131072}, 131072),  # the folder names the scaled length
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, 32768),  # past it rope would depend on the steps
    ],
)
def test_longest_sequence_counts_the_rope_scaling(tmp_path, fields, longest):
    """Guards against refusing lengths that YaRN supports, or accepting lengths that rope does not."""
    config = ModelConfig.from_folder(folder_of(tmp_path, **fields))
    assert longest_known(None, config) == longest
    assert longest_known(longest, config) == longest
    with pytest.raises(SettingsError, match=str(longest)):
        longest_known(longest + 1, config)


def dummy_namespace(folder: Path, device: str = "cpu") -> bytes:
    config = ModelConfig.from_folder(folder)
    layout = layout_of(config, PLAIN, 16)
    return namespace_of(folder, model_fingerprint(folder, "dummy", device), layout, "float32", config)


def test_dummy_models_of_one_layout_do_not_share_kv(tmp_path):
    """Guards against sharing KV between random models of equal layout."""
    plain = folder_of(tmp_path / "plain")
    wider = folder_of(tmp_path / "wider", intermediate_size=96)
    assert dummy_namespace(plain) == dummy_namespace(plain)
    assert dummy_namespace(plain) != dummy_namespace(wider)
    assert dummy_namespace(plain) != dummy_namespace(plain, "cuda"), "a GPU draws other numbers"


def test_plain_and_quantised_weights_do_not_share_kv(tmp_path):
    """Guards against KV of plain weights in use with quantised ones, even if all files were equal."""
    plain = folder_of(tmp_path / "plain")
    quantised = folder_of(tmp_path / "quantised", quantization_config={"quant_method": "fp8"})
    configs = [ModelConfig.from_folder(folder) for folder in (plain, quantised)]
    layout = layout_of(configs[0], PLAIN, 16)
    assert len({namespace_of(plain, b"m" * 32, layout, "float32", config) for config in configs}) == 2
    assert model_fingerprint(plain, "dummy") != model_fingerprint(quantised, "dummy")


def test_each_format_of_kv_has_a_namespace_of_its_own(tmp_path):
    """Guards against workers that read each other's blocks as something else: a plain and a quantised pool, scales made
    when KV is written and a checkpoint's, two sets of these, and formats behind weights of two dtypes."""
    folder = folder_of(tmp_path)
    config = ModelConfig.from_folder(folder)
    scales = torch.full((3, 2, 2), 0.5)
    formats = [PLAIN, KvFormat.fp8(), KvFormat.fp8(scales), KvFormat.fp8(scales * 2)]
    found = {
        namespace_of(folder, b"m" * 32, layout_of(config, each, 16), dtype, config)
        for each in formats
        for dtype in ("float32", "bfloat16")
    }
    assert len(found) == 8


# ---- pool, planes, device


def test_the_pool_has_the_requested_size(tmp_path):
    """Guards both options for the pool's size, and against a pool that is too small for a sequence."""
    layout = layout_of(ModelConfig.from_folder(folder_of(tmp_path)), PLAIN, 16)
    assert pool_blocks(7, 0.5, layout) == 7
    assert pool_blocks(None, 0.5, layout) == (1 << 29) // layout.block_bytes
    with pytest.raises(SettingsError, match="would have 0 blocks"):
        pool_blocks(None, 0.0, layout)
    with pytest.raises(SettingsError, match="would have 1 blocks"):
        pool_blocks(1, 0.5, layout)


def test_planes_depend_on_the_device():
    """Guards against offering a plane that the device cannot use, and against another order of preference."""
    assert checked_planes(["zmq", "shm"], ["shm", "zmq"]) == ("zmq", "shm")
    with pytest.raises(SettingsError, match="--plane nccl: there are shm, zmq"):
        checked_planes(["shm", "nccl"], ["shm", "zmq"])


def test_a_missing_gpu_is_an_error():
    """Guards against a traceback of torch on a machine without a GPU."""
    assert choose_device("cpu") == "cpu"
    if torch.cuda.is_available():
        assert choose_device("auto") == choose_device("cuda") == "cuda"
        return
    assert choose_device("auto") == "cpu"
    with pytest.raises(SettingsError, match="no CUDA device"):
        choose_device("cuda")


def test_a_model_is_bound_to_its_pool():
    """Guards the first step: the runner writes into the pool that the planes read, and no sequence exceeds it."""
    settings = DecodeSettings(num_blocks=4, block_tokens=8)
    model = load_model(settings, settings.worker_sizes("cpu"), "cpu", "decode", locate_model("demo"))
    assert (model.pool.num_blocks, model.layout.block_tokens, model.max_model_len) == (4, 8, 32)
    before = model.pool.digests([[2]])
    draw = Draw(SamplingSpec(max_tokens=1, temperature=0.0), [1, 2, 3], 3, 0)
    (drawn,) = model.runner.launch([Row([1, 2, 3], 0, [2], draw)]).read()
    assert drawn is not None and 0 <= drawn.token_ids[0] < model.config.vocab_size
    assert model.pool.digests([[2]]) != before
    model.pool.close()


def test_only_prefill_workers_have_stages():
    """Guards against a decode worker whose tokens wait for all stages in turn."""
    settings = DecodeSettings(pp=2, num_blocks=4)
    for role in ("decode", "mixed"):
        with pytest.raises(
            SettingsError, match=f"--pp 2: a {role} worker has one stage.*only prefill workers have more"
        ):
            load_model(settings, settings.worker_sizes("cpu"), "cpu", role, locate_model("demo"))
    with pytest.raises(SettingsError, match="--stages-bind with --pp 1"):
        PrefillSettings(stages_bind="tcp://127.0.0.1:0")


# ---- start and end


def test_a_worker_starts_and_stops():
    """Guards start-up without a proxy: the worker waits for one, and stops without leaving a thread."""
    settings = DecodeSettings(num_blocks=4, proxy=("tcp://127.0.0.1:9",), insecure_network=True)
    worker = start(settings, "cpu", "decode")
    try:
        parts = worker.parts
        assert (parts.manager.num_blocks, parts.layout.block_tokens, parts.max_model_len) == (4, 16, 64)
        assert parts.prefixes.counters == () and parts.io.receive(0.0) == []
    finally:
        worker.close()
    assert not worker.io._thread.is_alive()


@pytest.fixture
def process_settings():
    """Restores process-wide settings that `serve` changes."""
    interval, handlers = sys.getswitchinterval(), logging.root.handlers[:]
    yield
    sys.setswitchinterval(interval)
    logging.root.handlers[:] = handlers


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"insecure_network": False}, "no --secret-file"),
        ({"plane": ("nccl",)}, "--plane nccl"),
        ({"num_blocks": 1}, "would have 1 blocks"),
    ],
)
@pytest.mark.usefixtures("process_settings")
def test_a_failed_start_is_one_line(options, reason, capsys):
    """Guards the launcher's log: status 1 and one line without a traceback."""
    settings = DecodeSettings(device="cpu", **{"insecure_network": True, **options})
    assert serve("decode", settings, lambda parts, device: pytest.fail("started")) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("decode: ") and reason in error[-1]
