"""`cce_no_filter`: the paper's method with nothing skipped, so that what remains is the error of rounding and of
16-bit sums."""

from cce_precision.numerics import Accumulation, Variant

VARIANT = Variant(
    name="cce_no_filter",
    summary="no filter, sums in the input dtype",
    aliases=("no-filter",),
    accum_e=Accumulation.INPUT,
    accum_c=Accumulation.INPUT,
    label_apart=False,
)
