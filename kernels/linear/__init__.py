"""Matrix products with weights that are prepared once for the machine: y = x W^T + b, W in one of several formats.

`Linear` is what a model knows of a product; a format is a class with that interface: `DenseLinear` for plain numbers,
`ScaledLinear` for codes of 8 bits, `GroupedLinear` for codes of 4. `ExpertLinears` holds several experts in one
of them. A device's choice of kernel goes by `weight_format` and the sizes. Calling one is the reference of its kernels:
plain operations on the numbers that the codes stand for.
"""

from baton.kernels.linear.dense import DenseLinear, padded_rows
from baton.kernels.linear.experts import STACKED_FORMATS, STACKED_MULTIPLE, ExpertLinears
from baton.kernels.linear.grouped import GroupedLinear
from baton.kernels.linear.protocol import HeldWeight, Linear
from baton.kernels.linear.scaled import ScaledLinear

__all__ = [
    "STACKED_FORMATS",
    "STACKED_MULTIPLE",
    "DenseLinear",
    "ExpertLinears",
    "GroupedLinear",
    "HeldWeight",
    "Linear",
    "ScaledLinear",
    "padded_rows",
]
