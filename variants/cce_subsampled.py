"""`cce_subsampled`: exact above eps; below it one of every `share` columns (for dE) or tokens (for dC), with weight
`share`.

For diffuse tails, whose entries are too many to sample one by one: each share is a small dense product. One column of
every `share` neighbours in the order of mean logits is drawn at random, which is unbiased and stratified. In dE the
tail meets the classifier's rows less the mean of those above eps (`Variant.centred`)."""

from cce_precision.numerics import Filter, FilterKind, Granularity, Operand, Variant

SUBSET = Filter(FilterKind.SUBSET, Granularity.ELEMENT, share=8)

VARIANT = Variant(
    name="cce_subsampled",
    summary="exact above eps, the tail by 1/8 of the columns (dE) and tokens (dC)",
    filter_e=SUBSET,
    filter_c=SUBSET,
    operand=Operand.FP32_ABOVE,
    sort_vocabulary=True,
    centred=True,
)
