"""Times products of FP8 weights beside DeepGEMM's, in turns: us, and TB/s of the weight.

One JSON line a time on standard output, and appended to FILE; `error` is against float64. Weights are rotated past the
L2 cache, x is in codes already, and a time is the least of some medians of replays of a graph. DeepGEMM multiplies
`fp8_block`; `fp8_row` has a scale an output instead. DeepGEMM is the package sgl-deep-gemm, a rival in this benchmark
alone, of the version that was built for the torch at hand; it compiles by nvcc at the first call of a shape. Where it
is missing or fails, only ours are timed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

import torch

from baton.benchmark.gpu.ceilings import GPU, Call, seconds
from baton.benchmark.gpu.products import rotated
from baton.benchmark.harness.json_lines import JsonLines
from baton.benchmark.harness.options import bare_parser
from baton.kernels import ScaledLinear
from baton.kernels.triton.quantise import CodedRows, quantise
from baton.models.cuda.products import Products, fastest, shape_of

TURNS = 3
FORMATS = {"fp8_block": "fp8_block", "fp8_row": "fp8"}
"""Of weights, and their recipes."""
DeepGemm = Callable[..., None]
"""product((codes, scales) of x, (codes, scales) of W, out)"""


def deep_gemm() -> DeepGemm | None:
    try:
        module = import_module("deep_gemm")
    except (ImportError, OSError, RuntimeError) as failure:
        print(f"no DeepGEMM: {failure} ({failure.__cause__})", file=sys.stderr)
        return None
    product: DeepGemm = module.fp8_gemm_nt
    return product


def compare(
    file: Path, outputs: int, inputs: int, rows: Sequence[int], formats: Sequence[str], product: DeepGemm | None
) -> None:
    lines = JsonLines(file)
    weights = {each: _rotated(FORMATS[each], outputs, inputs) for each in formats}
    exact_weights = {each: some[0].dequantised(torch.float64) for each, some in weights.items()}
    shapes = [shape_of(some[0]) for some in weights.values()]
    products = Products(fastest, max(rows), shapes, torch.bfloat16, GPU)
    for num_rows in rows:
        x = torch.randn(num_rows, inputs, device=GPU).bfloat16()
        out = torch.empty(num_rows, outputs, dtype=torch.bfloat16, device=GPU)
        ways: dict[str, list[Call]] = {}
        for each, some in weights.items():
            codes = products.codes_for(some[0], num_rows)
            assert codes is not None, "FP8 takes rows in codes"
            quantise(x, codes)
            ways[each] = [partial(products, one, codes, out, pdl=True) for one in some]
            if each == "fp8_block" and product is not None:
                ways["deep_gemm"] = [_rival(product, codes, one, out) for one in some]
        times: dict[str, list[float]] = {way: [] for way in ways}
        of_way = {way: exact_weights["fp8_block" if way == "deep_gemm" else way] for way in ways}
        errors = {way: _error(calls[0], out, x.double() @ of_way[way].t()) for way, calls in ways.items()}
        for _ in range(TURNS):
            for way, calls in ways.items():
                times[way].append(seconds(calls))
        for way, took in times.items():
            lines.put(
                "product", way=way, n=outputs, k=inputs, rows=num_rows, us=round(min(took) * 1e6, 2),
                tb_s=round(outputs * inputs / min(took) / 1e12, 3), error=errors[way],
            )  # fmt: skip


def _rotated(recipe: str, outputs: int, inputs: int) -> list[ScaledLinear]:
    return [each for each in rotated(recipe, outputs, inputs) if isinstance(each, ScaledLinear)]


def _rival(product: DeepGemm, x: CodedRows, weights: ScaledLinear, out: torch.Tensor) -> Call:
    of_x = x.codes, x.scales.t()[: len(x.codes)]
    return partial(product, of_x, (weights.codes, weights.scales), out)


def _error(call: Call, out: torch.Tensor, exact: torch.Tensor) -> float:
    """Of what a call returns, maybe parts of a sum, or leaves in `out`."""
    found = call()
    result = (found if isinstance(found, torch.Tensor) else out).double()
    whole = result.sum(0) if result.dim() == 3 else result
    return float(f"{float((whole - exact).norm() / exact.norm()):.3g}")


def main(argv: Sequence[str]) -> int:
    parser = bare_parser("deep_gemm", __doc__)
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--shapes", default="7168x16384", help="outputs x inputs, comma separated")
    parser.add_argument("--rows", default="1,16,64")
    parser.add_argument("--formats", default=",".join(FORMATS), help="of weights")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    product = deep_gemm()
    for shape in options.shapes.split(","):
        outputs, inputs = map(int, shape.split("x"))
        rows, formats = [int(each) for each in options.rows.split(",")], options.formats.split(",")
        try:
            compare(options.file, outputs, inputs, rows, formats, product)
        except RuntimeError as failure:
            if product is None:
                raise
            print(f"DeepGEMM failed: {failure}", file=sys.stderr)
            product = None
            compare(options.file, outputs, inputs, rows, formats, product)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
