"""Products of many rows in codes with weights of 8 bits: FP8 by cuBLAS, INT8 by product_8bit_gluon, where these run."""

from __future__ import annotations

from collections.abc import Callable

import torch

from baton.kernels import ScaledLinear
from baton.kernels.triton.linear_8bit_policy import fit_many_rows
from baton.kernels.triton.quantise import RUN, CodedRows

CUBLAS_WIDTH = 16
"""cuBLAS multiplies bytes of matrices whose sizes are multiples of this."""
CUBLAS_RUNS = 4
"""Of inputs. For cuBLAS the scales of 128 outputs lie a multiple of so many apart (its documentation, "Scaling factors
layouts"), but `torch._scaled_mm` takes them side by side only: where these differ cuBLAS would read wrong scales, and
what lies behind the last, without an error."""
Int8Product = Callable[..., None]
"""product(x in codes, weight, out, fused=)"""


class ScaledManyRows:
    """With weights of one format."""

    def __init__(self, weight_format: str, deterministic: bool, dtype: torch.dtype, device: str) -> None:
        """deterministic: no weight fits, for these products' bits depend on the number of rows."""
        usable = dtype == torch.bfloat16 and device.startswith("cuda") and not deterministic
        self._by_cublas = usable and _cublas_multiplies(weight_format, device)
        self._int8 = _int8_product(device) if usable and weight_format == "int8_row" else None
        self._step = CUBLAS_RUNS * RUN if weight_format == "fp8_block" else CUBLAS_WIDTH  # of inputs

    def fits(self, num_outputs: int, num_inputs: int) -> bool:
        """Whether rows in codes are multiplied by such a weight."""
        if self._int8 is not None:
            return fit_many_rows(num_outputs, num_inputs)
        return self._by_cublas and num_inputs % self._step == num_outputs % CUBLAS_WIDTH == 0

    def __call__(self, weights: ScaledLinear, x: CodedRows, out: torch.Tensor) -> None:
        if self._int8 is not None:
            self._int8(x, weights, out, fused=False)
        else:
            _by_scaled_mm(weights, x, out)

    def gated(self, gate_up: ScaledLinear, x: CodedRows, out: torch.Tensor) -> bool:
        """silu(gate) * up, if there is a kernel for both together."""
        fitting = fit_many_rows(gate_up.num_outputs // 2, gate_up.num_inputs)
        if self._int8 is None or gate_up.bias is not None or not fitting:
            return False
        self._int8(x, gate_up, out, fused=True)
        return True


def _by_scaled_mm(weights: ScaledLinear, x: CodedRows, out: torch.Tensor) -> None:
    """With scales of runs, rows are added up to as many as scales have room for: what lies behind x's and out's."""
    rows, k = x.codes.shape
    if x.scales.dim() == 2:
        rows = x.scales.shape[1]
        codes, scales, of_weight = x.codes.as_strided((rows, k), (k, 1)), x.scales.t(), weights.scales.t()
    else:
        codes, scales, of_weight = x.codes, x.scales[:, None], weights.scales[None, :]
    padded = out.as_strided((rows, weights.num_outputs), (weights.num_outputs, 1))
    torch._scaled_mm(codes, weights.codes.t(), scales, of_weight, out_dtype=out.dtype, out=padded)
    if weights.bias is not None:
        out.add_(weights.bias)


def _cublas_multiplies(weight_format: str, device: str) -> bool:
    """Scales of blocks are for Hopper alone."""
    if weight_format == "int8_row":
        return False
    capability = torch.cuda.get_device_capability(device)
    return capability == (9, 0) if weight_format == "fp8_block" else capability >= (9, 0)


def _int8_product(device: str) -> Int8Product | None:
    """product_8bit_gluon, where it runs."""
    # Gluon has no interpreter and changes with Triton's versions: it is imported where it may be used.
    from baton.kernels.triton import prefill_gluon, product_8bit_gluon

    if not prefill_gluon.is_available(torch.cuda.get_device_capability(device)):
        return None
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count

    def product(x: CodedRows, weight: ScaledLinear, out: torch.Tensor, *, fused: bool) -> None:
        product_8bit_gluon.product_8bit(x, weight.codes, weight.scales, weight.bias, num_sms, out, fused=fused)

    return product
