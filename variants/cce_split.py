"""`cce_split`: `cce_exact` with dZ as a hi + lo pair, which removes its rounding: the error is that of rounding the
output."""

from cce_precision.numerics import Operand, Variant

VARIANT = Variant(
    name="cce_split",
    summary="cce_exact with dZ as a hi + lo pair: the output-rounding floor",
    operand=Operand.SPLIT,
)
