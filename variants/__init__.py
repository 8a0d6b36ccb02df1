"""All variants: one record a file, `ALL` by name, `get` by name or alias."""

from __future__ import annotations

import difflib
import importlib

from cce_precision.numerics import Variant

__all__ = ["ALL", "DEFAULT", "get"]

_NAMES = (
    "baseline",
    "torch_compile",
    "cce",
    "cce_no_filter",
    "cce_kahan",
    "cce_kahan_full_c",
    "cce_kahan_full_e",
    "cce_exact",
    "cce_split",
    "cce_sparse",
    "cce_unbiased",
    "cce_subsampled",
)

ALL: dict[str, Variant] = {name: importlib.import_module(f"cce_precision.variants.{name}").VARIANT for name in _NAMES}
DEFAULT = "cce_exact"

_BY_ALIAS = {alias: variant for variant in ALL.values() for alias in (variant.name, *variant.aliases)}


def get(impl: str | Variant) -> Variant:
    """The variant called `impl` (a name or an alias); a record is returned as it is.

    Raises TypeError for another type, ValueError for an unknown name, listing the known ones and the nearest.
    """
    if isinstance(impl, Variant):
        return impl
    if not isinstance(impl, str):
        raise TypeError(f"impl must be a variant's name or a Variant record, got {type(impl).__name__}")
    if impl in _BY_ALIAS:
        return _BY_ALIAS[impl]
    near = difflib.get_close_matches(impl, _BY_ALIAS, n=1, cutoff=0.3)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"impl={impl!r} is not a known variant; known: {', '.join(sorted(_BY_ALIAS))}{hint}")
