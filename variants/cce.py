"""`cce`: Cut Cross-Entropy as published: tiles whose |P - onehot| stays below eps are skipped, sums live in the input
dtype.

Source: Wijmans et al., arXiv 2411.09009."""

from cce_precision.numerics import Accumulation, Filter, FilterKind, Granularity, Variant

TILE_DROP = Filter(FilterKind.DROP, Granularity.TILE)

VARIANT = Variant(
    name="cce",
    summary="the paper: tile filter, sums in the input dtype",
    filter_e=TILE_DROP,
    filter_c=TILE_DROP,
    accum_e=Accumulation.INPUT,
    accum_c=Accumulation.INPUT,
    label_apart=False,
    sort_vocabulary=True,
)
