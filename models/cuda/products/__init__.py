"""Which kernel does each matrix product of a step, by the format of its weight and the number of rows.

`products` asks by format, `policy` says how many rows run how; a format is a file with a class that follows
`products.FormatProducts`: `dense` for plain numbers, `dequantised` for weights that no kernel reads yet.
"""

from baton.models.cuda.products.policy import (
    TABLED_ROWS,
    Policy,
    fastest,
    invariant,
    shape_of,
    untuned,
)
from baton.models.cuda.products.products import FormatProducts, Products

__all__ = ["TABLED_ROWS", "FormatProducts", "Policy", "Products", "fastest", "invariant", "shape_of", "untuned"]
