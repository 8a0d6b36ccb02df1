"""`cce_kahan_full_e`: Kahan sums, and the embedding's gradient unfiltered."""

from cce_precision.numerics import Accumulation, Filter, FilterKind, Granularity, Variant

TILE_DROP = Filter(FilterKind.DROP, Granularity.TILE)

VARIANT = Variant(
    name="cce_kahan_full_e",
    summary="tile filter for dC alone, Kahan sums",
    filter_c=TILE_DROP,
    accum_e=Accumulation.KAHAN,
    accum_c=Accumulation.KAHAN,
    label_apart=False,
    sort_vocabulary=True,
)
