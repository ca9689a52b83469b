"""Guards benchmark/gpu/step_breakdown.py: the parts of a step sum to its span, and no kernel is left out."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="Triton is made for Linux only")

import torch
from torch.autograd import DeviceType

from baton.benchmark.gpu import step_breakdown as bench
from baton.benchmark.gpu.ceilings import Ceilings
from baton.benchmark.harness.json_lines import JsonLines
from baton.benchmark.harness.shapes import SHAPES
from baton.models.allocation import allocate
from baton.models.batch import Draw, Row
from baton.models.config import ModelConfig
from baton.models.layer_weights import Weights
from baton.models.partition import WHOLE
from baton.node.messages.control import SamplingSpec
from baton.testing.late_queue import LateQueue

KERNELS = Path(__file__).parents[4] / "kernels" / "triton"
WAIT = "at::cuda::(anonymous namespace)::spin_kernel(long)"
DRAW = Draw(SamplingSpec(max_tokens=9, temperature=0.0), (), 0, 1)
COPY_ONLY, COMPUTE_ONLY = Ceilings(1.0, float("inf")), Ceilings(float("inf"), 1.0)


def intervals(*given: tuple[str, int, int]) -> list[bench.Interval]:
    return [bench.Interval(*each) for each in given]


def llama(**changed: object) -> tuple[ModelConfig, Weights]:
    """Of bfloat16, without memory."""
    config = replace(ModelConfig.from_folder(SHAPES / "llama-3.1-8b"), **changed)
    return config, allocate(config, False, WHOLE, torch.bfloat16, "meta", {})[0]


def rows(*given: tuple[int, int, bool]) -> list[Row]:
    """(new, cached, draws) each."""
    return [Row([0] * new, cached, [], DRAW if draws else None) for new, cached, draws in given]


def test_an_overlap_belongs_to_the_kernel_that_began_first() -> None:
    """A kernel that was launched early waits for the one before; its wait would count as its work, or twice."""
    spent = bench.spent_ns(intervals(("a", 0, 10), ("b", 7, 15), ("a", 15, 20), ("c", 24, 30)))
    assert spent == {"a": 15, "b": 5, "c": 6, "gap": 4}


def test_a_kernel_within_another_takes_nothing() -> None:
    """What lies under a longer kernel ends before it; time would else run backwards, or a gap appear."""
    spent = bench.spent_ns(intervals(("a", 0, 20), ("b", 3, 5), ("c", 8, 24), ("d", 24, 25)))
    assert spent == {"a": 20, "b": 0, "c": 4, "d": 1, "gap": 0}


def test_passes_begin_behind_their_waits() -> None:
    """Kernels taken for another step's would make a step of two, and the wait is no work."""
    trace = intervals(
        ("late", 31, 40), (WAIT, 20, 30), ("before", 0, 1), ("first", 6, 9), (WAIT, 2, 5), ("late", 50, 51)
    )
    assert bench.passes_of(trace) == [intervals(("first", 6, 9)), intervals(("late", 31, 40), ("late", 50, 51))]


def test_the_parts_sum_to_the_span_and_nothing_hides() -> None:
    """A share missing from the report could not be found."""
    linear, attention = "_linear_rows_kernel", "_decode_attention_kernel"
    step = intervals(
        ("Memcpy HtoD (Pinned -> Device)", 0, 1_000), (linear, 2_000, 50_000), (attention, 48_000, 90_000),
        ("void at::native::vectorized_elementwise_kernel<4, FillFunctor>", 90_000, 100_000),
    )  # fmt: skip
    longer = [*step, bench.Interval("_norm_kernel", 100_000, 900_000)]
    found = bench.summary([longer, step, step[:2]], 0.11, {"linear": 40e-6})
    parts = found["parts"]
    assert sum(part["ms"] for part in parts.values()) == pytest.approx(found["span_ms"]) == pytest.approx(0.1)
    assert sum(part["share"] for part in parts.values()) == pytest.approx(1.0)
    assert parts["linear"] == {"ms": 0.048, "share": 0.48, "floor_ms": 0.04}
    assert (parts["attention"]["ms"], parts["copy"]["ms"], parts["gap"]["ms"]) == (0.04, 0.001, 0.001)
    assert found["other"] == {step[3].name: 0.01}
    assert (found["timed_gap_ms"], found["kernels"]) == (pytest.approx(0.011), 4)


def test_launches_are_listed_from_the_beginning_of_their_pass() -> None:
    assert bench.launches(intervals(("first", 5000, 7000), ("second", 6500, 9000))) == [
        ("first", 0.0, 2.0),
        ("second", 1.5, 4.0),
    ]


def test_a_pass_without_kernels_is_an_error() -> None:
    """A profiler that saw nothing would else report a step of nothing."""
    with pytest.raises(RuntimeError, match="without kernels"):
        bench.summary([[]], 1.0, {})


def test_every_kernel_of_a_step_has_a_group() -> None:
    """One that is new or renamed would move a part of the step to `other`."""
    names = set()
    for path in KERNELS.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            jitted = isinstance(node, ast.FunctionDef) and node.decorator_list and node.name.endswith("_kernel")
            if jitted and path.name != "blocks.py":
                names.add(node.name)
    assert {"_linear_row_kernel", "_prefill_kernel", "_gather_kernel"} <= names
    assert [name for name in names if bench.group_of(name) == bench.OTHER] == []


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("_linear_row_kernel", "linear"),
        ("_row_kernel", "draw"),
        ("_gated_product_kernel", "linear"),
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_TNT", "linear"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16>(Params)", "linear"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int>", "linear"),
        ("_prefill_kernel", "attention"),
        ("_prefill_attention_kernel", "attention"),
        ("void at::native::(anonymous namespace)::indexSelectLargeIndex<c10::BFloat16>", "inputs"),
        ("void at::native::vectorized_gather_kernel<16, int>", "inputs"),
        ("_scatter_kernel", "draw"),
        ("Memset (Device)", "copy"),
        ("Memcpy DtoH (Device -> Pinned)", "copy"),
        ("void at::native::reduce_kernel<512>", "other"),
    ],
)
def test_groups(name: str, group: str) -> None:
    """Names that contain one another, and those of libraries."""
    assert bench.group_of(name) == group


def test_a_decode_step_reads_all_weights_and_the_keys_and_values_once() -> None:
    """A floor above what must be read would be beaten; one below hides what is left."""
    config, weights = llama()
    layer = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336
    floors = bench.floors_s(config, weights, 2 * config.head_dim, [rows((1, 1023, True), (1, 511, True))], COPY_ONLY)
    assert floors["linear"] == 2 * (32 * layer + 128256 * 4096)
    assert floors["attention"] == 32 * (1024 + 512) * 2 * 8 * 128 * 2


def test_a_prompt_computes_its_products_and_pairs() -> None:
    """Behind the last attention only the token that draws is computed; a chunk without it leaves even the weights."""
    config, weights = llama(num_layers=2, windowed_layers=(False, False))
    qkv, behind, head = 4096 * 6144, 4096 * 4096 + 3 * 4096 * 14336, 128256 * 4096
    last = bench.floors_s(config, weights, 2 * config.head_dim, [rows((100, 28, True))], COMPUTE_ONLY)
    assert last["linear"] == 2 * (100 * (2 * qkv + behind) + behind + head)
    assert last["attention"] == 2 * 4 * 32 * 128 * sum(range(29, 129))
    first = bench.floors_s(config, weights, 2 * config.head_dim, [rows((100, 28, False))], COPY_ONLY)
    assert first["linear"] == 2 * (2 * qkv + behind)
    assert first["attention"] == 128 * 2 * 8 * 128 * 2
    both = bench.floors_s(
        config, weights, 2 * config.head_dim, [rows((100, 0, False)), rows((28, 100, True))], COMPUTE_ONLY
    )
    assert both["linear"] == 2 * (128 * (2 * qkv + behind) + behind + head)


@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize(("new", "cached"), [(1, 0), (1, 9), (7, 0), (7, 3), (7, 30)])
def test_what_tokens_see(new: int, cached: int, window: int | None) -> None:
    """Closed forms against counting."""
    seen = [range(max(0, at + 1 - (window or at + 1)), at + 1) for at in range(cached, cached + new)]
    assert bench.num_pairs(new, cached, window) == sum(map(len, seen))
    assert bench.num_keys(new, cached, window) == len({key for keys in seen for key in keys})


class FakeProfile:
    """torch's profiler beside a clock that each call moves by a microsecond and a nanosecond."""

    def __init__(self) -> None:
        self.now_ns, self.seen = 1_000_000, []

    def __enter__(self) -> FakeProfile:
        return self

    def __exit__(self, *_: object) -> None: ...

    def call(self, name: str, device: DeviceType = DeviceType.CUDA) -> None:
        begin, self.now_ns = self.now_ns, self.now_ns + 1_001
        times = SimpleNamespace(start=begin / 1e3, end=self.now_ns / 1e3)
        self.seen.append(SimpleNamespace(name=name, device_type=device, time_range=times))

    def events(self) -> list[SimpleNamespace]:
        return self.seen[::-1]


def test_a_line_a_cell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A cell that got another's passes would report the other's time."""
    fake, queue = FakeProfile(), LateQueue()
    monkeypatch.setattr(bench, "profile", lambda activities: fake)
    monkeypatch.setattr(bench.torch.cuda, "_sleep", lambda cycles: fake.call(WAIT), raising=False)

    def run(names: list[str]) -> None:
        fake.call("cudaGraphLaunch", DeviceType.CPU)
        for name in names:
            queue.enqueue(lambda name=name: fake.call(name))

    kernels = {"small": ["_norm_kernel"], "large": ["_norm_kernel", "_linear_rows_kernel"]}
    cells = [
        bench.Profiled({"what": what}, lambda names=names: run(names), 0.01, {}) for what, names in kernels.items()
    ]
    bench.report(JsonLines(), queue, cells)
    small, large = (json.loads(text) for text in capsys.readouterr().out.splitlines())
    assert (small["what"], small["kernels"], small["span_ms"]) == ("small", 1, 0.001)
    assert (large["what"], large["kernels"], large["span_ms"]) == ("large", 2, 0.002)
    assert large["parts"]["linear"]["share"] == 0.5


def test_a_trace_that_lost_passes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines would name cells that they are not of."""
    monkeypatch.setattr(bench, "recorded", lambda queue, runs: [intervals(("a", 0, 1))])
    with pytest.raises(RuntimeError, match=f"{bench.PASSES} passes ran, the trace has 1"):
        bench.report(JsonLines(), LateQueue(), [bench.Profiled({}, print, 0.0, {})])
