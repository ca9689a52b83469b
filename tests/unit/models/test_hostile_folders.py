"""Model folders that lie about sizes, types and files: one clear sentence, before memory is allocated for them.

The proxy's half is in tests/unit/proxy/text/test_hostile_files.py.
"""

import json
import os
import struct

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from baton.kvtransfer.blocks.hashing import tokenizer_fingerprint
from baton.models.check import check
from baton.models.checkpoint import MAX_HEADER_BYTES, Checkpoint
from baton.models.config import ModelConfig
from baton.models.folder import MAX_LENGTH
from baton.models.rope import inverse_frequencies
from baton.models.weights import load_weights
from baton.node.errors import SettingsError
from baton.tests.unit.models.test_config import PLAIN, QWEN2, read, write

SIZES = [key for key, value in PLAIN.items() if isinstance(value, int)]
NO_SIZES = [10**12, 2**62, 10**400, -1, 0, 1.5, float("nan"), float("inf"), True, "8", [], {}, [8], "9" * 10_000]

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, -1, 2**24, 2**31, 2**63, 2**64, 10**400])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["yarn", "llama3", "longrope", "linear", "dynamic", "default", "sliding_attention", "\x1b[31m\n"]
    ),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
ROPE_KEYS = [
    *("rope_type", "type", "factor", "rope_theta", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"),
    *("mscale", "mscale_all_dim", "attention_factor", "short_factor", "long_factor", "truncate"),
    *("original_max_position_embeddings", "partial_rotary_factor"),
]
KEYS = [
    *(*PLAIN, "model_type", "head_dim", "rms_norm_eps", "rope_theta", "sliding_window", "use_sliding_window"),
    *("layer_types", "max_window_layers", "eos_token_id", "hidden_act", "attention_bias", "mlp_bias"),
    *("tie_word_embeddings", "quantization_config", "original_max_position_embeddings"),
]
ropes = st.dictionaries(st.sampled_from(ROPE_KEYS), json_values, max_size=6) | json_values
edits = st.dictionaries(st.sampled_from(KEYS), json_values, max_size=4)


def assert_is_one_sentence(error: SettingsError) -> None:
    text = str(error)
    assert text.isprintable() and len(text) < 700, text


@pytest.mark.parametrize("key", [*SIZES, "head_dim"])
@pytest.mark.parametrize("value", NO_SIZES, ids=lambda value: f"{type(value).__name__} {str(value)[:8]}")
def test_a_size_that_no_model_has_is_named(tmp_path, key, value):
    """Guards against tensors of 10^12 rows, a division by zero and a conversion that overflows."""
    with pytest.raises(SettingsError, match=f"'{key}' must be") as raised:
        read(tmp_path, PLAIN | {key: value})
    assert_is_one_sentence(raised.value)


@pytest.mark.parametrize("value", [10**400, 1e-320, -1, 0, float("nan"), float("inf"), True, "1", [1]])
def test_a_number_that_no_model_has_is_named(tmp_path, value):
    """Guards against an OverflowError: whole numbers in JSON have no bound."""
    for key in ("rms_norm_eps", "rope_theta"):
        with pytest.raises(SettingsError, match=f"'{key}' must be"):
            read(tmp_path, PLAIN | {key: value})


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example({}, {"rope_type": "yarn", "factor": 1e20}, None)
@example({"rope_theta": 1}, {"rope_type": "yarn", "factor": 2}, None)
@example({}, {"rope_type": "yarn", "factor": 2, "beta_fast": 1e308}, None)
@example({}, {"rope_type": "longrope", "short_factor": [10**400] * 8, "long_factor": [float("nan")] * 8}, None)
@example({"eos_token_id": list(range(1000))}, {}, {"eos_token_id": [2**70, -1, "x"]})
@given(edits, ropes, st.none() | edits)
def test_any_configuration_is_read_or_refused(tmp_path, changes, rope, generation):
    """Guards against any exception but SettingsError, and against a value that no message or step could carry."""
    for base in (PLAIN, QWEN2):
        try:
            config = read(tmp_path, base | {"rope_scaling": rope} | changes, generation)
        except SettingsError as error:
            assert_is_one_sentence(error)
            continue
        assert 1 <= config.max_model_len <= MAX_LENGTH
        assert inverse_frequencies(config.rope).shape == (config.head_dim // 2,)
        assert all(0 <= token_id < 2**31 for token_id in config.eos_token_ids)


HOSTILE_TEXTS = {
    "deep": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "no JSON": b"\x00" * 100,
    "not UTF-8": b'{"a": "\xff"}',
    "a list": b"[]",
    "nothing": b"",
    "a huge number": b'{"vocab_size": ' + b"9" * 100_000 + b"}",
}


@pytest.mark.parametrize("text", HOSTILE_TEXTS.values(), ids=HOSTILE_TEXTS)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_broken_json_is_named(tmp_path, name, text):
    write(tmp_path, PLAIN)
    (tmp_path / name).write_bytes(text)
    with pytest.raises(SettingsError, match=name) as raised:
        ModelConfig.from_folder(tmp_path)
    assert_is_one_sentence(raised.value)


def make_sparse(path):
    with path.open("wb") as file:
        file.truncate(1 << 30)


ODD_FILES = {
    "1 GiB": make_sparse,
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("make", ODD_FILES.values(), ids=ODD_FILES)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
def test_what_is_no_file_of_a_bounded_size_is_not_read(tmp_path, name, make):
    """Guards against a start that hangs on a pipe, or reads a device until memory ends."""
    write(tmp_path, PLAIN)
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)
    with pytest.raises(SettingsError, match=name):
        ModelConfig.from_folder(tmp_path)
        tokenizer_fingerprint(tmp_path)


# ---- weights ----------------------------------------------------------------------------------------------------


def with_header(make_model, change):
    """A folder whose safetensors header is the bytes, or the object, that `change` makes of the true one."""
    folder = make_model("llama").folder
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    made = change(header)
    if not isinstance(made, bytes):
        made = json.dumps(made).encode()
    path.write_bytes(struct.pack("<Q", len(made)) + made + data)
    return folder


def tensor(**changes):
    name = "model.norm.weight"
    return lambda header: header | {name: header[name] | changes}


HEADERS = {
    "offsets beyond the file": tensor(data_offsets=[0, 2**50]),
    "negative offsets": tensor(data_offsets=[-8, 8]),
    "reversed offsets": tensor(data_offsets=[192, 0]),
    "overlap": tensor(data_offsets=[0, 192]),
    "shape of 2^80": tensor(shape=[2**40, 2**40]),
    "shape of 10^12": tensor(shape=[10**12]),
    "shape of 10^30": tensor(shape=[10**30]),
    "negative shape": tensor(shape=[-48]),
    "fractional shape": tensor(shape=[4.8]),
    "100,000 dimensions": tensor(shape=[1] * 100_000),
    "shape as a text": tensor(shape="48"),
    "unknown type": tensor(dtype="F99"),
    "whole numbers": tensor(dtype="I32"),
    "truth values": tensor(dtype="BOOL"),
    "missing field": lambda header: header | {"model.norm.weight": {"dtype": "F32"}},
    "no object": lambda header: [1],
    "empty": lambda header: {},
    "not UTF-8": lambda header: b"\xff\xfe{}",
    "deep": lambda header: b"[" * 100_000 + b"]" * 100_000,
    "name twice": lambda header: (
        json.dumps(header).encode()[:-1] + b', "model.norm.weight": {"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    ),
    "too long": lambda header: b"{" + b" " * MAX_HEADER_BYTES + b"}",
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS)
def test_a_header_that_lies_is_named(make_model, change):
    """Guards against offsets, shapes and types that point outside the file, or at memory without a bound."""
    folder = with_header(make_model, change)
    with pytest.raises(SettingsError) as raised:
        load_weights(ModelConfig.from_folder(folder), folder, torch.float32)
    assert_is_one_sentence(raised.value)


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_a_header_length_that_lies_is_named(make_model, length):
    path = make_model("llama").folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    with pytest.raises(SettingsError, match="not a whole safetensors file"):
        Checkpoint.open(path.parent)


SHARDS = {
    "path upwards": "../../../../etc/passwd",
    "absolute": "/etc/passwd",
    "this folder": ".",
    "folder above": "..",
    "nothing": "",
    "NUL": "a\x00b",
    "new line": "a\nb",
    "too long": "a" * 5000,
    "half a surrogate pair": "\ud800",
    "not there": "model-1.safetensors",
    "number": 5,
    "null": None,
}


@pytest.mark.parametrize("shard", SHARDS.values(), ids=SHARDS)
def test_an_index_names_files_of_its_folder_only(tmp_path, shard):
    """Guards against reading outside the folder, and against names that the file system refuses."""
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(SettingsError) as raised:
        Checkpoint.open(tmp_path)
    assert_is_one_sentence(raised.value)


@pytest.mark.parametrize("target", ["/etc/passwd", "/dev/zero", "/nowhere"])
def test_a_link_to_something_else_is_no_checkpoint(tmp_path, target):
    """Guards links, which the hub's cache is made of: their targets are read as safetensors or not at all."""
    (tmp_path / "model.safetensors").symlink_to(target)
    with pytest.raises(SettingsError):
        check(write(tmp_path, PLAIN), "auto", None)


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_shapes_are_compared_before_memory_is_allocated(make_model, edit_config, monkeypatch, load_format):
    """Guards against a config.json whose sizes, each of them possible, make a model of 10^16 bytes."""
    folder = make_model("llama").folder
    edit_config(folder, intermediate_size=1 << 22, hidden_size=1 << 22, num_hidden_layers=100, vocab_size=1 << 22)
    allocated = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: allocated.append(options) or empty(*size, **options))
    with pytest.raises(SettingsError, match="GiB" if load_format == "dummy" else "GiB|is missing"):
        load_weights(ModelConfig.from_folder(folder), folder, torch.float32, load_format=load_format)
    assert {options["device"] for options in allocated} == {"meta"}


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_header_is_read_or_refused(data, tmp_path_factory):
    """Guards against an exception of the library that is none of its own, such as a panic."""
    fields = st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), json_values, max_size=3)
    entries = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "BF16", "I64", "F8_E4M3", "F4", "C64"]),
            "shape": st.lists(st.integers(0, 2**64), max_size=4),
            "data_offsets": st.lists(st.integers(0, 64) | st.integers(0, 2**64), min_size=2, max_size=2),
        }
    )
    header = json.dumps(data.draw(st.dictionaries(st.text(max_size=4), entries | fields, max_size=4))).encode()
    header = data.draw(st.just(header) | st.binary(max_size=64))
    length = data.draw(st.just(len(header)) | st.integers(0, 2**64 - 1))
    folder = tmp_path_factory.getbasetemp()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + header + data.draw(st.binary(max_size=64)))
    try:
        Checkpoint.open(folder)
    except SettingsError as error:
        assert_is_one_sentence(error)
