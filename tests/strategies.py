"""Hypothesis strategies for problems of every kind, for all tests: the eager passes', the kernels', the audit's.

    @given(knobs())                       def test_...(k): verdict = judge(k)
    @given(knobs(impl=just("cce")))       a strategy or a value for any field of `Knobs`
    @given(knobs(family="exact"))         multiples of 1/8 of at most 4: logits without a rounding

A problem is a seed and knobs, so that a failing one shrinks to few knobs and reprints as one line.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from cce_precision.analysis.fuzz_problems import CHOICES, EDGES, PATTERNS, Knobs, sensible
from cce_precision.numerics import Path
from cce_precision.variants import ALL

__all__ = ["EAGER", "FILTERED", "TILED", "knobs", "sizes"]

EAGER = tuple(name for name, variant in ALL.items() if variant.path is not Path.COMPILED)  # all that need no compiler
TILED = tuple(name for name, variant in ALL.items() if variant.path is Path.TILED)
FILTERED = tuple(name for name, variant in ALL.items() if variant.filtered)


def sizes(largest: int = 257) -> SearchStrategy[int]:
    """Small integers, and the neighbours of vector lengths and tile sizes."""
    return st.one_of(st.integers(1, min(24, largest)), st.sampled_from([x for x in EDGES if x <= largest]))


def _choice(name: str) -> SearchStrategy[Any]:
    return st.sampled_from(CHOICES[name])


@st.composite
def knobs(draw: st.DrawFn, family: str = "any", largest: int = 257, **fixed: Any) -> Knobs:
    """Knobs of a problem with at most 2^17 products. `fixed` sets fields, to a value or a strategy.

    family: "any"; "plain" leaves out special entries and upstream gradients; "exact" has logits without a rounding.
    """
    strategies: dict[str, SearchStrategy[Any]] = {
        "seed": st.integers(0, 2**31 - 1),
        "n": sizes(largest),
        "v": sizes(largest),
        "d": sizes(largest),
        "batch": st.sampled_from((1, 1, 2, 3)),
        "impl": st.sampled_from(EAGER),
        "reduction": _choice("reduction"),
        "scale": _choice("scale"),
        "margin": _choice("margin"),
        "e_dtype": st.sampled_from(("bf16", "fp16", "fp32", "fp64")),
    }
    if family != "plain":
        strategies |= {
            "c_dtype": st.one_of(st.just("same"), _choice("c_dtype")),
            "bias": _choice("bias"),
            "pattern": st.sampled_from(PATTERNS) if family == "any" else st.just("exact"),
            "softcap": _choice("softcap") if family == "any" else st.none(),
            "temperature": st.one_of(st.just(1.0), _choice("temperature")) if family == "any" else st.just(1.0),
            "label_smoothing": _choice("label_smoothing"),
            "class_weight": st.booleans(),
            "upstream": _choice("upstream"),
            "ignored": _choice("ignored"),
            "ignore_index": _choice("ignore_index"),
            "nan_ignored": st.booleans(),
            "shift": _choice("shift"),
            "filter_eps": _choice("filter_eps"),
            "filter_e_grad": st.booleans(),
            "filter_c_grad": st.booleans(),
            "accum_fp32": st.booleans(),
            "use_lse": st.booleans(),
            "use_entropy": st.booleans(),
            "z_loss": st.booleans(),
            "strided": st.booleans(),
        }
    fields = {}
    for name, strategy in strategies.items():
        given = fixed.get(name, strategy)
        fields[name] = draw(given) if isinstance(given, SearchStrategy) else given
    for name in fixed.keys() - fields.keys():
        fields[name] = draw(fixed[name]) if isinstance(fixed[name], SearchStrategy) else fixed[name]
    while fields["n"] * fields["v"] * fields["d"] > 2**17:
        widest = max(("n", "v", "d"), key=lambda name: fields[name])
        fields[widest] = max(1, fields[widest] // 4)
    return sensible(Knobs(**fields))
