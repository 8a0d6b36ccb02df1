"""What a campaign of random problems found: statistics of errors and bounds, as data and as a page."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from cce_precision.analysis.fuzz import QUANTITIES
from cce_precision.analysis.fuzz_problems import Knobs
from cce_precision.analysis.provenance import commit

__all__ = ["holds", "page", "summary"]


def holds(row: dict[str, Any]) -> bool:
    """Whether a judged problem raised nothing and no error exceeds its bound."""
    return "error" not in row and all(q["ratio"] <= 1 for q in row["quantities"].values())


def _statistics(rows: Iterable[dict[str, Any]], name: str) -> dict[str, Any]:
    """Of one quantity: how often it was judged, how near an error came to its bound, and how wide the bound is."""
    found = [row["quantities"][name] for row in rows if name in row.get("quantities", ())]
    narrow = sorted(q["bound"] / q["error"] for q in found if q["error"] > 0 and math.isfinite(q["bound"]))
    nonzero = [q for q in found if q["truth"] > 0]
    return {
        "judged": len(found),
        "largest error / bound": max((q["ratio"] for q in found), default=0.0),
        "without error": sum(q["error"] == 0 for q in found),
        "without bound": sum(not math.isfinite(q["bound"]) for q in found),
        "zero rejected": sum(q["bound"] < q["truth"] for q in nonzero) / max(len(nonzero), 1),
        "median bound / error": statistics.median(narrow) if narrow else None,
        "90 % bound / error": narrow[int(0.9 * (len(narrow) - 1))] if narrow else None,
    }


def summary(
    rows: Sequence[dict[str, Any]], seed: int, backend: str = "eager", impls: Sequence[str] = ()
) -> dict[str, Any]:
    """What a campaign on a backend found, with where it comes from. `impls`: the only ones that it drew; none: all."""
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {"variant": defaultdict(list), "dtype": defaultdict(list)}
    for row in rows:
        knobs = {"impl": Knobs.impl, "e_dtype": Knobs.e_dtype, "c_dtype": Knobs.c_dtype} | row["knobs"]
        groups["variant"][knobs["impl"]].append(row)
        e, c = knobs["e_dtype"], knobs["c_dtype"]
        groups["dtype"][e if c in ("same", e) else "mixed"].append(row)
    last = max((row["index"] for row in rows), default=-1)
    place = "" if backend == "eager" else f" --backend {backend}"
    place += f" --variants {','.join(impls)}" if impls else ""
    return {
        "command": f"cce-precision fuzz --problems {last + 1} --seed {seed}{place}",
        "commit": commit() or None,
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "backend": backend,
        "seed": seed,
        "device": torch.cuda.get_device_name() if backend == "cuda" else "CPU",
        "problems": len(rows),
        "violations": [row for row in rows if not holds(row)],
        "median bound / error": _median(rows),
        "quantities": {name: _statistics(rows, name) for name in QUANTITIES},
        **{
            kind: {
                key: {
                    "problems": len(group),
                    "median bound / error": _median(group),
                    **{name: _statistics(group, name) for name in QUANTITIES},
                }
                for key, group in sorted(named.items())
            }
            for kind, named in groups.items()
        },
    }


def _median(rows: Iterable[dict[str, Any]]) -> float | None:
    """Of bound / error, over all quantities of all problems."""
    found = [q for row in rows for q in row.get("quantities", {}).values()]
    ratios = [q["bound"] / q["error"] for q in found if q["error"] > 0 and math.isfinite(q["bound"])]
    return statistics.median(ratios) if ratios else None


def page(found: dict[str, Any]) -> str:
    """The summary as a page."""
    number = lambda x: "-" if x is None else f"{x:.3g}"  # noqa: E731
    bad = len(found["violations"])
    place = {
        "eager": f"in plain PyTorch ({found['cpu']})",
        "interpreter": "Triton's kernels in their interpreter",
        "emulated": "Triton's kernels in their interpreter with an H200's tiles and tensor cores, under its bounds",
        "cuda": f"Triton's kernels on one {found['device']}",
    }[found["backend"]]
    took = f", {found['minutes']:.1f} minutes" if "minutes" in found else ""
    lines = [
        f"# {found['problems']} random problems: {bad or 'no'} error{'s' if bad != 1 else ''} above the bound",
        "",
        "Every output and gradient of `linear_cross_entropy` against the truth, |out - truth| <= bound + radius",
        "elementwise, over all variants, dtypes and options. Bound / error is the ratio of Frobenius norms, its median",
        f"over all quantities {number(found['median bound / error'])}. Zero rejected: the share of nonzero quantities",
        "whose norm exceeds that of their bound, so that zeros in their place would not pass.",
        "",
        f"`{found['command']}`, commit {found['commit']}, PyTorch {found['torch']}, {place}{took}.",
        "",
        "| quantity | judged | largest error / bound | median bound / error | 90 % | zero rejected | no claim |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, q in found["quantities"].items():
        lines.append(
            f"| {name} | {q['judged']} | {q['largest error / bound']:.4f} | {number(q['median bound / error'])} | "
            f"{number(q['90 % bound / error'])} | {q['zero rejected']:.1%} | {q['without bound']} |"
        )
    for kind in ("variant", "dtype"):
        heads = " | ".join(f"{name}: largest, median" for name in ("value", "dE", "dC"))
        lines += ["", f"| {kind} | problems | all: median | {heads} |", "|---|---|---|---|---|---|"]
        for key, group in found[kind].items():
            cells = " | ".join(
                f"{group[name]['largest error / bound']:.4f}, {number(group[name]['median bound / error'])}"
                for name in ("value", "dE", "dC")
            )
            lines.append(f"| {key} | {group['problems']} | {number(group['median bound / error'])} | {cells} |")
    if bad:
        lines += ["", "Violations:", ""] + [f"    {json.dumps(row['knobs'])}" for row in found["violations"]]
    return "\n".join(lines) + "\n"
