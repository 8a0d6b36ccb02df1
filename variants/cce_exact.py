"""`cce_exact`: nothing filtered, fp32 sums rounded once, the target's term in fp32. What is left is the rounding of dZ
and of the output, beside which entries that weigh nothing together are not told from 0."""

from cce_precision.numerics import Variant

VARIANT = Variant(
    name="cce_exact",
    summary="no filter, fp32 sums, target term in fp32",
    aliases=("cce_kahan_full", "cce_kahan_full_c_full_e"),
    flushed=True,
)
