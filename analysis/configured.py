"""Variants with other settings, as the commands name them: cce_unbiased@2^-14, cce_subsampled@2^-12/32."""

from __future__ import annotations

import dataclasses

from cce_precision.analysis.sweep import parse_eps
from cce_precision.numerics import FilterKind, Variant
from cce_precision.variants import get

__all__ = ["configured"]


def configured(text: str) -> Variant:
    """The variant NAME, NAME@EPS or NAME@EPS/SHARE (an EPS left empty stays as it is); NAME@off filters and flushes
    nothing.

    Raises ValueError for an unknown name, a threshold that the variant does not have or that is no probability, and a
    share of a variant that samples no subsets.
    """
    name, _, settings = text.partition("@")
    variant = get(name)
    eps, _, share = settings.partition("/")
    if eps == "off":
        variant = variant.configure(None)
    elif eps:
        variant = variant.configure(parse_eps(eps)[0])
    if share:
        kinds = {variant.filter_e.kind, variant.filter_c.kind}
        if kinds != {FilterKind.SUBSET} or not share.isdecimal() or int(share) < 1:
            raise ValueError(f"{text!r}: /SHARE is a whole number of a variant that samples subsets")
        side = lambda f: dataclasses.replace(f, share=int(share))  # noqa: E731
        variant = dataclasses.replace(variant, filter_e=side(variant.filter_e), filter_c=side(variant.filter_c))
    return variant
