"""`cce_kahan_full_c`: Kahan sums, and the classifier's gradient unfiltered: the paper's choice for pretraining,
where the filter would starve rare tokens."""

from cce_precision.numerics import Accumulation, Filter, FilterKind, Granularity, Variant

TILE_DROP = Filter(FilterKind.DROP, Granularity.TILE)

VARIANT = Variant(
    name="cce_kahan_full_c",
    summary="tile filter for dE alone, Kahan sums",
    filter_e=TILE_DROP,
    accum_e=Accumulation.KAHAN,
    accum_c=Accumulation.KAHAN,
    label_apart=False,
    sort_vocabulary=True,
)
