"""What lies on a disk: configurations, headers of weights and of KV, tenants, traces, batches.

Each reader has one error for all that is wrong with its file.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from baton.benchmark.load.traces import read_trace
from baton.kvtransfer.store.disk.folder import Boot, Contents, TierFolder
from baton.kvtransfer.store.disk.record import HEADER_BYTES, check_record, pack_header, parse_header
from baton.kvtransfer.store.disk.records import RecordFault
from baton.models.checkpoint import Checkpoint
from baton.models.config import ModelConfig
from baton.node.errors import SettingsError
from baton.node.modelhub import locate_model
from baton.node.secret_file import read_secret, write_secret
from baton.node.tenant_rules import read_tenants
from baton.offline.batch import BatchOutput, read_requests
from baton.proxy.text.model_files import read_model_files
from baton.proxy.text.template import check_template
from baton.tests.fuzz.mutations import feed, mutations

DEMO = locate_model("demo")
NAMESPACE, KEY = b"n" * 32, b"k" * 32


def test_headers_of_records() -> None:
    """Guards the host's store against what lies on its disk: a record is whole, or a miss."""
    payload = memoryview(b"p" * 256)
    header = pack_header(NAMESPACE, KEY, 7, payload, b"d" * 16)
    assert check_record(header, payload, NAMESPACE, KEY) == b"d" * 16

    def accept(data: bytes) -> None:
        parse_header(data, NAMESPACE)
        check_record(data[:HEADER_BYTES], payload, NAMESPACE, KEY)
        assert data[:HEADER_BYTES] == header

    feed([header], 5000, accept, RecordFault)


def test_states_of_store_folders(tmp_path: Path) -> None:
    """Guards the start of a store: a state that cannot be understood is as if it were not there."""
    folder = TierFolder(tmp_path, Contents("slab", NAMESPACE, 4096, 1 << 20), Boot("run", 1.0))
    folder.begin()
    state = tmp_path / "state.json"
    whole = state.read_bytes()
    understood = 0
    for data in mutations([whole], 400):
        state.write_bytes(data)
        understood += folder._read_state() is not None
    assert 0 < understood < 400
    folder.close()


def test_configurations(tmp_path: Path) -> None:
    """Guards workers against the text of config.json; tests/unit/models has its values."""

    def accept(data: bytes) -> None:
        (tmp_path / "config.json").write_bytes(data)
        ModelConfig.from_folder(tmp_path)

    feed([(DEMO / "config.json").read_bytes()], 400, accept, SettingsError)


def test_headers_of_weights(tmp_path: Path) -> None:
    """Guards workers against safetensors files that were cut, shifted or made to lie."""
    header = json.dumps(
        {
            "__metadata__": {"format": "pt"},
            "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
            "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
        }
    ).encode()
    whole = struct.pack("<Q", len(header)) + header + bytes(24)

    def accept(data: bytes) -> None:
        (tmp_path / "model.safetensors").write_bytes(data)
        opened = Checkpoint.open(tmp_path)
        assert opened.forms.keys() == opened.holders.keys()

    feed([whole], 500, accept, SettingsError)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_files_of_the_proxy(tmp_path: Path, name: str) -> None:
    """Guards the proxy against the text of every file that it reads beside the tokenizer."""
    small = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(small))
    rich = {
        "added_tokens_decoder": {"3": {"content": "<e>", "special": True, "lstrip": False}},
        "eos_token": "<e>",
        "eos_token_id": [3, 1],
        "extra_special_tokens": ["<x>"],
        "chat_template": [{"name": "default", "template": "{{ messages }}"}],
        "temperature": 0.5,
        "top_k": 3,
    }

    def accept(data: bytes) -> None:
        (tmp_path / name).write_bytes(data)
        read_model_files(tmp_path)

    feed([(DEMO / name).read_bytes(), json.dumps(rich).encode()], 200, accept, SettingsError)


def test_sources_of_templates() -> None:
    """Guards the proxy's start against a source that is no template; what runs it is a process of its own."""
    source = b"{% for m in messages %}{{ m.role | upper }}{% if loop.last %}{{ m.content[1:] }}{% endif %}{% endfor %}"
    feed([source], 800, lambda data: check_template(data.decode(errors="replace")), SettingsError)


def test_tenants(tmp_path: Path) -> None:
    """Guards the proxy, which reads this file again while it serves."""
    path = tmp_path / "tenants.toml"
    source = (
        b'[a]\nkeys_sha256 = ["'
        + b"0" * 64
        + b'"]\nmodels = ["m"]\n\n[b]\nkeys_sha256 = ["'
        + b"1" * 64
        + b'"]\nadmin = true\n'
    )

    def accept(data: bytes) -> None:
        path.write_bytes(data)
        read_tenants(path)

    accept(source)
    feed([source], 400, accept, SettingsError)


TRACES = [
    b'{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}\n'
    b'{"timestamp": 3000, "input_length": 5, "output_length": 1}\n',
    b"TIMESTAMP,ContextTokens,GeneratedTokens\n"
    b"2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n",
]


def test_secrets(tmp_path: Path) -> None:
    """Guards every node's start: a secret is 64 hex digits, or the start ends with an error."""
    path = tmp_path / "secret"
    write_secret(path)

    def accept(data: bytes) -> None:
        path.write_bytes(data)
        assert read_secret(path).hex() == data.strip().decode().lower()

    feed([path.read_bytes()], 300, accept, SettingsError)


def test_traces() -> None:
    """Guards benchmarks against traces that were cut or edited."""
    quoted = b'TIMESTAMP,ContextTokens,GeneratedTokens\n"2023-11-16 18:15:46,1,2\n2023-11-16 18:15:50,3,4\n'
    with pytest.raises(SettingsError, match="line 2"):
        read_trace(quoted.decode().splitlines())
    feed(TRACES, 3000, lambda data: read_trace(data.decode(errors="surrogateescape").splitlines()), SettingsError)


def test_batches(tmp_path: Path) -> None:
    """Guards batches: a line that is no request is answered as such, and an output is not taken for another file."""
    line = b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": "x"}}\n'
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    for data in mutations([line * 3], 300):
        source.write_bytes(data)
        assert all(request.error or request.url for request in read_requests(source))

    def accept(data: bytes) -> None:
        output.write_bytes(data)
        with BatchOutput(output):
            pass

    answer = b'{"id":"b","custom_id":"a","response":{"status_code":200,"request_id":"r","body":{}},"error":null}\n'
    feed([answer * 2], 300, accept, SettingsError)
