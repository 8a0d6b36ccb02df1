"""What a tail in 8 bits would err: a variant that does not exist, tried by its arithmetic alone.

    python -m cce_precision.analysis.fp8_tail --out reports/unbiased-filter      # fp8_tail.parquet, fp8_tail.md

Entries of the softmax above a threshold are exact, as in `cce_sparse`. All that lies below, which that variant drops,
is rounded to fp8 (e4m3, one power of two for all), and so are the rows of c and e that it meets: two dense products in
8 bits, which a GPU multiplies at twice the rate of 16. Nothing is drawn, nothing is left out, and no bias has a
direction. Everything else is fp64, so that what is shown is the rounding of the tail alone; for an estimator of a
filter, the deviation from the exact gradient (`filter_estimators`) is the number beside it.

Tensor cores of Hopper keep 13 bits of a sum of fp8 products below the largest exponent (arXiv 2511.10909; not recorded
here, unlike those of 16 bits in `tensor_core`), so that long sums lose their end: what a run of `promoted` products
gives is added in fp32, as kernels for such products do.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cce_precision.analysis import cases
from cce_precision.analysis.provenance import provenance
from cce_precision.analysis.tensor_core import TensorCore, dot

__all__ = ["HOPPER_FP8", "errors", "rounded", "summed"]

FP8 = torch.float8_e4m3fn
HOPPER_FP8 = TensorCore(block=32, fraction=13)
THRESHOLDS = (8, 10, 12)  # k of 2^-k
PROMOTED = (None, 128, 1024, 8192)  # products of a run; None: sums without an error
TOKENS, COLUMNS = 48, 192  # rows of dE and dC that are compared


def rounded(x: Tensor) -> tuple[Tensor, float]:
    """x in fp8 after a power of two that makes its largest entry as large as fp8 takes; and that power."""
    scale = 2.0 ** math.floor(math.log2(torch.finfo(FP8).max / max(float(x.abs().max()), 2.0**-100)))
    return (x * scale).float().to(FP8), scale


def summed(a: Tensor, b: Tensor, promoted: int | None, core: TensorCore = HOPPER_FP8) -> Tensor:
    """a (M, K) times b (K, N), fp8, in fp64: runs of `promoted` products by the tensor core, which are added in fp32;
    without an error where it is None.
    """
    if promoted is None:
        return a.double() @ b.double()
    total = torch.zeros(a.shape[0], b.shape[1])
    for start in range(0, a.shape[1], promoted):
        left, right = a[:, start : start + promoted], b[start : start + promoted].T
        depth = -left.shape[1] % core.block
        left, right = (torch.nn.functional.pad(x.float(), (0, depth)).to(FP8) for x in (left, right))
        total += dot(left[:, None, :], right[None, :, :], torch.zeros_like(total), core)
    return total.double()


def errors(case: cases.Case, eps: float, promoted: int | None) -> dict[str, float]:
    """Relative errors (Euclidean norm) of some rows of dE and dC of the summed loss: with the tail in fp8, and with the
    tail dropped.
    """
    e, c, targets = case.e.double(), case.c.double(), case.targets
    p = torch.softmax(e @ c.T, 1).scatter(1, targets[:, None], 0.0)
    tail = torch.where(p < eps, p, 0.0)
    label = -p.sum(1)  # P_t - 1
    tokens, columns = (torch.arange(0, k, max(1, k // some)) for k, some in ((len(e), TOKENS), (len(c), COLUMNS)))
    own = targets[None, :] == columns[:, None]  # (columns, N)
    exact_e = p[tokens] @ c + label[tokens, None] * c[targets[tokens]]
    exact_c = p[:, columns].T @ e + (own * label) @ e
    (p8, by), (c8, by_c), (e8, by_e) = (rounded(x) for x in (tail, c, e))
    low_e = summed(p8[tokens], c8, promoted) / (by * by_c)
    low_c = summed(p8[:, columns].T, e8, promoted) / (by * by_e)
    found = {"mass_below": float(tail.sum(1).mean()), "entries": float((p >= eps).sum(1).double().mean())}
    for side, exact, low, full in (
        ("dE", exact_e, low_e, tail[tokens] @ c), ("dC", exact_c, low_c, tail[:, columns].T @ e),
    ):  # fmt: skip
        found[side] = float((low - full).norm() / exact.norm())
        found[f"{side}_dropped"] = float(full.norm() / exact.norm())
    return found


def heads() -> dict[str, cases.Case]:
    """The shipped head at its stages, and two synthetic ones."""
    made = {f"shipped, {stage}": cases.captured(stage=stage) for stage in ("initial", "early", "trained")}
    synthetic = {"synthetic, trained": "trained", "synthetic, flat": "init"}
    return made | {name: cases.find(kind)(256, 16384, 128, torch.bfloat16, 0) for name, kind in synthetic.items()}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| head | exact from | entries a row | mass below | runs of | error of dE, dC | the same dropped |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        run = "no error of sums" if row["promoted"] is None else f"{row['promoted']:,}"
        lines.append(
            f"| {row['head']} | 2^-{row['k']} | {row['entries']:,.0f} | {row['mass_below']:.3f} | {run} "
            f"| {row['dE']:.1e}, {row['dC']:.1e} | {row['dE_dropped']:.1e}, {row['dC_dropped']:.1e} |"
        )
    return "\n".join(lines)


def main() -> None:
    import pandas as pd
    from rich.progress import track

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="Folder of fp8_tail.parquet and fp8_tail.md.")
    out: Path = parser.parse_args().out
    tried = [(k, promoted) for k in THRESHOLDS for promoted in PROMOTED if k == THRESHOLDS[-1] or promoted is None]
    work = [(name, case, k, promoted) for name, case in heads().items() for k, promoted in tried]
    rows: list[dict[str, Any]] = []
    for name, case, k, promoted in track(work, "a tail in fp8"):
        rows.append({"head": name, "k": k, "promoted": promoted} | errors(case, 2.0**-k, promoted))
    out.mkdir(parents=True, exist_ok=True)
    made = provenance(torch.get_num_threads(), "python -m cce_precision.analysis.fp8_tail")
    pd.DataFrame([row | made for row in rows]).to_parquet(out / "fp8_tail.parquet")
    (out / "fp8_tail.md").write_text(table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
