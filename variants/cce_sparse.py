"""`cce_sparse`: softmax entries below eps are dropped one by one, so dZ is a sparse matrix and the backward two sparse
products.

The error is the dropped mass, which always points along the same direction; the statistics bound it."""

from cce_precision.numerics import Filter, FilterKind, Granularity, Operand, Variant

ELEMENT_DROP = Filter(FilterKind.DROP, Granularity.ELEMENT)

VARIANT = Variant(
    name="cce_sparse",
    summary="entries below eps dropped one by one, fp32 sums",
    filter_e=ELEMENT_DROP,
    filter_c=ELEMENT_DROP,
    operand=Operand.FP32,
)
