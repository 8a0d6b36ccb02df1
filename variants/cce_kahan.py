"""`cce_kahan`: `cce` with Kahan-compensated sums in the input dtype."""

from cce_precision.numerics import Accumulation, Filter, FilterKind, Granularity, Variant

TILE_DROP = Filter(FilterKind.DROP, Granularity.TILE)

VARIANT = Variant(
    name="cce_kahan",
    summary="tile filter, Kahan sums",
    filter_e=TILE_DROP,
    filter_c=TILE_DROP,
    accum_e=Accumulation.KAHAN,
    accum_c=Accumulation.KAHAN,
    label_apart=False,
    sort_vocabulary=True,
)
