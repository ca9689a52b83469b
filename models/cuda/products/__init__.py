"""Which kernel does each matrix product of a step, by the format of its weight and the number of rows.

`products` asks by format, `policy` says how many rows run how. A format is a file with a class that follows
`products.FormatProducts`: `dense` for plain numbers, `dequantised` for weights that no kernel reads; `scaled`, for
codes of 8 bits, also takes rows in codes. Products of experts have files of their own, `experts_*`.
"""

from baton.models.cuda.products.policy import (
    PADDING,
    TABLED_ROWS,
    Policy,
    fastest,
    invariant,
    shape_of,
    untuned,
)
from baton.models.cuda.products.products import FormatProducts, Products, Rows, plain

__all__ = [
    "PADDING",
    "TABLED_ROWS",
    "FormatProducts",
    "Policy",
    "Products",
    "Rows",
    "fastest",
    "invariant",
    "plain",
    "shape_of",
    "untuned",
]
