"""Start-up, joining and refusal: a wrong configuration ends with one line, and running nodes are not affected."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import httpx
import pytest

from baton.launch.supervisor import ChildSpec
from baton.node.secret_file import write_secret
from baton.tests.integration.cluster import ROOT, Cluster, start_node

DEMO = ROOT / "models" / "demo"
REFUSED_TIMEOUT_S = 120.0
NO_PROXY = "tcp://127.0.0.1:1"
IN_THE_CLEAR = "--insecure-network"


def error_line(module: str, *arguments: str) -> str:
    """The one line that a process prints before it exits with status 1, without its log."""
    argv = (sys.executable, "-P", "-m", f"baton.{module}", "--log-level", "error", *arguments)
    with TemporaryFile() as printed:
        node = start_node(ChildSpec(name=module, group=module, argv=argv, env=os.environ), printed)
        try:
            status = node.wait(REFUSED_TIMEOUT_S)
        finally:
            node.send_signal(signal.SIGKILL)
        printed.seek(0)
        lines = printed.read().decode().splitlines()
    assert status == 1 and len(lines) == 1 and lines[0].startswith(f"{module}: "), (status, lines)
    return lines[0]


def cut_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def cut_weights_in_their_header(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def edit_config(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return edit


FAULTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "truncated weights": (cut_weights, ["model.safetensors", "whole safetensors file"]),
    "weights cut in the header": (cut_weights_in_their_header, ["model.safetensors", "whole safetensors file"]),
    "no weights": (remove_weights, ["model.safetensors"]),
    "missing key": (edit_config(lambda config: config.pop("num_hidden_layers")), ["config.json", "num_hidden_layers"]),
    "wrong type": (edit_config(lambda config: config.update(hidden_size="big")), ["config.json", "hidden_size"]),
    "more layers than weights": (edit_config(lambda config: config.update(num_hidden_layers=9)), ["layers.8."]),
    "another shape": (edit_config(lambda config: config.update(intermediate_size=512)), ["tensor", "expected"]),
    "another architecture": (
        edit_config(lambda config: config.update(architectures=["LlamaForTokenClassification"])),
        ["LlamaForTokenClassification", "LlamaForCausalLM"],
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), ["config.json"]),
    "config that is no JSON": (lambda folder: (folder / "config.json").write_text("{"), ["config.json", "JSON"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_worker_names_the_fault_of_a_model_folder(fault: str, tmp_path: Path) -> None:
    """Guards the error message: it names the file or the key instead of ending in a library's traceback."""
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder)
    break_it, named = FAULTS[fault]
    break_it(folder)
    line = error_line("decode", IN_THE_CLEAR, "--model", str(folder), "--proxy", NO_PROXY, "--device", "cpu")
    assert all(name in line for name in named), line


@pytest.mark.parametrize("broken", ["tokenizer.json", "tokenizer_config.json"])
def test_the_proxy_names_the_fault_of_a_tokenizer(broken: str, tmp_path: Path) -> None:
    """Guards the proxy's error message for a broken tokenizer."""
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder)
    (folder / broken).write_text('{"version": ')
    assert broken in error_line(
        "proxy", IN_THE_CLEAR, "--model", str(folder), "--port", "0", "--control-address", "tcp://127.0.0.1:0"
    )


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


def test_port_in_use(taken_port: int) -> None:
    """Guards against a process that runs but does not listen."""
    control, http = f"tcp://127.0.0.1:{taken_port}", str(taken_port)
    assert http in error_line("proxy", IN_THE_CLEAR, "--port", http, "--control-address", "tcp://127.0.0.1:0")
    assert control in error_line("proxy", IN_THE_CLEAR, "--port", "0", "--control-address", control)
    assert control in error_line("prefill", IN_THE_CLEAR, "--proxy", NO_PROXY, "--device", "cpu", "--bind", control)


def test_what_is_open_to_others_needs_an_option(tmp_path: Path) -> None:
    """Guards against exposing the API to the network, and links that are not authenticated to anybody, by accident."""
    secret = tmp_path / "secret"
    write_secret(secret)
    control = ("--control-address", "tcp://127.0.0.1:0")
    for line in (
        error_line("proxy", "--host", "0.0.0.0", "--port", "0", *control, "--secret-file", str(secret)),
        error_line("proxy", "--port", "0", *control),
        error_line("prefill", "--proxy", NO_PROXY),
        error_line("decode", "--proxy", NO_PROXY),
    ):
        assert "--insecure-network" in line


def make_other_model(folder: Path) -> None:
    """A random model of another shape with the demo's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)


def test_worker_of_another_namespace_is_refused(tmp_path: Path) -> None:
    """Guards against KV transfers between different models or block sizes."""
    make_other_model(tmp_path / "other")
    with Cluster(log_folder=tmp_path) as cluster:
        before = cluster.complete("The old king", max_tokens=8)["choices"]
        incompatible = {
            "model": ("prefill", "--model", str(tmp_path / "other")),
            "blocks": ("decode", "--block-tokens", "32"),
            "dtype": ("prefill", "--dtype", "bfloat16"),
            "kv": ("decode", "--kv-dtype", "fp8"),
        }
        for name, (role, *arguments) in incompatible.items():
            cluster.nodes.add_worker(role, name, *arguments)
        for name in incompatible:
            cluster.wait_until(
                lambda name=name: cluster.nodes.log(name).count("join_refused") > 1,
                f"{name} tries again",
                REFUSED_TIMEOUT_S,
            )
            assert "another namespace" in cluster.nodes.log(name)
        assert cluster.num_workers() == 2
        assert cluster.complete("The old king", max_tokens=8)["choices"] == before
        for name in incompatible:
            cluster.nodes.signal(name, signal.SIGTERM)
            assert cluster.wait_end(name) == 0
            cluster.nodes.forget(name)
        cluster.wait_idle()


def test_a_refused_worker_joins_when_those_it_does_not_fit_have_left(tmp_path: Path) -> None:
    """Guards the workers of a cluster: whatever registered first set the namespace, and one refusal ended them."""
    alone: dict[str, Any] = {"prefill": 0, "decode": 1, "proxy_args": ("--local-prefill", "always")}
    with Cluster(**alone, worker_args=("--block-tokens", "32"), log_folder=tmp_path) as cluster:
        cluster.nodes.add_worker("decode", "decode-1", "--block-tokens", "16")
        cluster.wait_until(
            lambda: "join_refused" in cluster.nodes.log("decode-1"), "decode-1 is refused", REFUSED_TIMEOUT_S
        )
        cluster.nodes.signal("decode-0", signal.SIGTERM)
        assert cluster.wait_end("decode-0") == 0
        cluster.nodes.forget("decode-0")
        cluster.wait_workers("decode-1")


def test_two_proxies_over_the_same_workers(tmp_path: Path) -> None:
    """Guards workers of two proxies: requests do not mix, and the death of one proxy does not affect the other."""
    second = Cluster(0, 0, log_folder=tmp_path / "second")
    (tmp_path / "second").mkdir()
    both = ("--proxy", f"tcp://127.0.0.1:{second.nodes.ports.control}", *second.secret_args)
    prompts = ["The old king had three daughters", "A mouse lived under the floor", "Long ago, the moon"]
    body = {"max_tokens": 60, "ignore_eos": True}
    own = ("--local-prefill", "never", *second.secret_args)
    with Cluster(worker_args=both, proxy_args=own, log_folder=tmp_path) as first, second:
        first.wait_workers("prefill-0", "decode-0")
        second.wait_workers("prefill-0", "decode-0")
        streams = [cluster.begin(prompt, **body) for prompt in prompts for cluster in (first, second)]
        texts = [stream.join().text for stream in streams]
        assert texts[0::2] == texts[1::2] and all(texts)
        streams = [cluster.begin(f"Again: {prompt}", **body) for prompt in prompts for cluster in (first, second)]
        first.wait_until(lambda: all(stream.num_chunks for stream in streams), "all streams have begun")
        second.nodes.kill("proxy")
        for stream in streams[0::2]:
            assert stream.join().finish == "length" and stream.broken is None
        first.wait_idle()
        second.nodes.start_node("proxy")
        second.nodes.wait_ready(2)
        again = [second.begin(f"Again: {prompt}", **body).join().text for prompt in prompts]
        assert again == [stream.text for stream in streams[0::2]]
        assert httpx.get(f"{first.url}/ready", timeout=60).is_success
        first.wait_idle()
        second.wait_idle()
