"""The benchmark of one colocated worker: what it starts and what it sends."""

import json

import pytest

from baton.benchmark.cluster import one_gpu as bench
from baton.benchmark.cluster.one_gpu import CPU_WORKLOADS, GPU_WORKLOADS, Configuration
from baton.benchmark.cluster.running import ServedModel
from baton.benchmark.harness.shapes import make_model

MODEL = ServedModel("demo", ("--load-format=dummy",), 64, 1 << 20)


def test_worker_computes_its_own_prompts_with_the_options_of_the_configuration():
    """Guards against a comparison of two equal servers: an option of a configuration that reaches no worker."""
    options = bench._options(["--configuration", "small:--max-chunk-tokens=512,--max-num-batched-tokens=768", "plain"])
    small, plain = options.configuration
    served = small.serve(MODEL, options)
    assert (served.prefill, served.decode, served.local_prefill, served.gpus) == (0, 1, "always", (0,))
    assert served.worker_arg[-2:] == ("--max-chunk-tokens=512", "--max-num-batched-tokens=768")
    assert "--load-format=dummy" in served.worker_arg
    assert plain.serve(MODEL, options).worker_arg == ("--load-format=dummy", *bench.GPU_ARGUMENTS)


def test_tokenizer_of_the_family_keeps_the_vocabulary_of_the_shape(tmp_path):
    """Guards against figures of a model that is smaller than the one named: the demo's vocabulary shrinks the head."""
    family = tmp_path / "family"
    family.mkdir()
    (family / "tokenizer.json").write_text("{}")
    folders = make_model("llama-3.1-8b", tmp_path / "whole", family), make_model("llama-3.1-8b", tmp_path / "small")
    whole, small = (json.loads((folder / "config.json").read_text()) for folder in folders)
    assert whole["vocab_size"] == 128256 > small["vocab_size"]
    assert (folders[0] / "tokenizer.json").read_text() == "{}"


def test_configuration_without_arguments():
    assert Configuration.parse("default") == Configuration("default", ())


@pytest.mark.parametrize("workloads", [CPU_WORKLOADS, GPU_WORKLOADS])
def test_each_workload_ends(workloads):
    """Guards against a run without an end: a workload has a number of prompts, or a rate and a duration."""
    assert set(workloads) == set(GPU_WORKLOADS)
    for workload in workloads.values():
        assert (workload.num_prompts and workload.at_once) or (workload.rate and workload.duration_s)
