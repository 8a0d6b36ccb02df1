"""The oracle, and a campaign of random problems under it: |out - truth| <= bound + radius, and no further tolerance.

judge        runs the call that some knobs describe and compares every output and gradient with the truth
campaign     many problems, resumable: `python -m cce_precision.analysis.fuzz --problems 10000 --out reports/fuzz`
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cce_precision import compute_z_loss, linear_cross_entropy
from cce_precision.analysis.bounds import CPU, Machine, bound
from cce_precision.analysis.fuzz_problems import COMPILED, Call, Knobs, build, random_knobs
from cce_precision.analysis.references import Quantities, Truth, truth
from cce_precision.variants import ALL

__all__ = ["QUANTITIES", "Comparison", "Verdict", "campaign", "compare", "judge", "judge_outputs", "outputs", "summary"]

BALLS = 2**12  # products up to which a call in fp64 is judged by ball arithmetic
QUANTITIES = ("value", "lse", "entropy", "dE", "dC", "dbias")


@dataclass(frozen=True)
class Comparison:
    """One quantity of one call against the truth."""

    ratio: float  # largest error / (bound + radius) of an element: at most 1, or the bound is wrong
    error: float  # Frobenius norm
    bound: float  # Frobenius norm of bound + radius
    truth: float  # Frobenius norm
    worst: tuple[int, ...]  # index of the largest ratio

    @property
    def holds(self) -> bool:
        return self.ratio <= 1

    @property
    def tells(self) -> bool:
        """Whether a zero in place of the quantity would be rejected in the norm."""
        return self.bound < self.truth


@dataclass(frozen=True)
class Verdict:
    knobs: Knobs
    quantities: dict[str, Comparison]

    @property
    def holds(self) -> bool:
        return all(q.holds for q in self.quantities.values())

    def __str__(self) -> str:
        lines = [
            f"{name}: largest error / bound {q.ratio:.3g} at {q.worst}; norms of error, bound and truth "
            f"{q.error:.3g}, {q.bound:.3g}, {q.truth:.3g}"
            for name, q in self.quantities.items()
        ]
        return "\n".join((self.knobs.to_json(), *lines))


def compare(computed: Tensor, exact: Tensor, allowed: Tensor) -> Comparison:
    """Error against allowance, elementwise. Equal infinities and NaN against NaN are exact; inf allows anything."""
    computed, exact = computed.detach().double(), exact.double()
    same = (computed == exact) | (computed.isnan() & exact.isnan())
    error = torch.where(same, 0.0, (computed - exact).abs()).nan_to_num(nan=math.inf)
    ratio = torch.where(error == 0, 0.0, torch.where(allowed.isinf(), 0.0, error / allowed))
    norm = lambda x: float(torch.linalg.vector_norm(x.nan_to_num()))  # noqa: E731
    bounded = math.inf if bool(allowed.isinf().any()) else norm(allowed)
    if not ratio.numel():
        return Comparison(0.0, 0.0, 0.0, 0.0, ())
    worst = tuple(int(i) for i in torch.unravel_index(ratio.argmax(), ratio.shape))
    return Comparison(float(ratio.max()), norm(error), bounded, norm(exact), worst)


def outputs(call: Call) -> dict[str, Tensor]:
    """Runs the call: the value of its objective, lse and entropy (flat, 0 where without a place), the gradients."""
    leaves = [x.detach().requires_grad_() for x in (call.e, call.c, *(() if call.bias is None else (call.bias,)))]
    bias = leaves[2] if call.bias is not None else None
    result: Any = linear_cross_entropy(leaves[0], leaves[1], call.targets, bias, **call.options)
    heads: dict[str, Tensor] = {"loss": result[0], "lse": result[1]}
    if call.knobs.use_entropy:
        heads["entropy"] = result[2]
    if "z_loss" in call.grads:
        k = call.knobs
        heads["z_loss"] = compute_z_loss(heads["lse"], call.targets, k.shift, k.ignore_index, k.reduction)
    upstream = call.grads
    gradients = torch.autograd.grad([heads[name] for name in upstream], leaves, list(upstream.values()))
    flat = {name: _flat(call, head) for name, head in heads.items() if name in ("lse", "entropy")}
    named = dict(zip(("dE", "dC", "dbias"), gradients, strict=False))
    named["dE"] = named["dE"].reshape(-1, call.problem.d)
    return {"value": _value(call, heads, flat), **flat, **named}


def _flat(call: Call, head: Tensor) -> Tensor:
    """An unreduced output as (N,), with 0 for the tokens that a shift leaves without a place."""
    full = torch.zeros(call.problem.n, dtype=head.dtype)
    full[call.counted] = head.detach().reshape(-1)
    return full


def _value(call: Call, heads: dict[str, Tensor], flat: dict[str, Tensor]) -> Tensor:
    """The objective from the call's outputs; what the call itself does not add up is added in fp64."""
    o, n = call.objective, call.problem.n
    rows = torch.arange(n)
    extra = sum((o.per_token(name, rows) * flat[name].double() for name in flat), torch.zeros(n, dtype=torch.float64))
    valid = call.problem.targets >= 0
    extra = torch.where(valid, extra, 0.0)
    total = _flat(call, heads["loss"]).double() if o.reduction == "none" else heads["loss"].detach().double()
    if "z_loss" in heads:
        z = heads["z_loss"]
        total = (
            total + o.per_token("z_loss", rows[:1]) * (_flat(call, z) if o.reduction == "none" else z.detach()).double()
        )
    if o.reduction == "none":
        return total + extra
    weight = o.column_weight(call.problem, extra.device)[call.problem.targets[valid]]
    count = 1.0 if o.reduction == "sum" else weight.sum() if o.class_weight is not None else valid.sum()
    return total.reshape(()) + (extra.sum() / count if bool(extra.any()) else 0.0)


def judge(k: Knobs, method: str | None = None, machine: Machine = CPU) -> Verdict:
    """Runs the call and compares what it gives with the truth, by the bound for `machine`.

    `method` of the truth; None: fp64, but balls for small calls in fp64, whose errors an fp64 truth would share.
    """
    call = build(k)
    if method is None:
        small = call.problem.n * call.problem.v * call.problem.d <= BALLS
        method = "balls" if small and call.problem.compute_dtype is torch.float64 else "fp64"
    exact = truth(call.problem, call.objective, method)
    allowed = bound(call.problem, call.plan, call.objective, seed=call.knobs.seed, machine=machine)
    return judge_outputs(call, outputs(call), exact, allowed)


def judge_outputs(call: Call, computed: dict[str, Tensor], exact: Truth, allowed: Quantities) -> Verdict:
    """The verdict on outputs of the call, whoever computed them."""
    comparisons = {}
    for name, value in computed.items():
        radius = getattr(exact.radius, name)
        comparisons[name] = compare(value, getattr(exact, name), getattr(allowed, name) + radius)
    return Verdict(call.knobs, comparisons)


# The campaign.


def _row(index: int, seed: int, impls: Sequence[str]) -> dict[str, Any]:
    """Problem `index` of a campaign, judged."""
    knobs = random_knobs(random.Random(f"{seed} {index}"), impls)
    row: dict[str, Any] = {"index": index, "knobs": json.loads(knobs.to_json())}
    try:
        verdict = judge(knobs)
    except Exception as error:  # a crash is a finding like any other
        return row | {"error": f"{type(error).__name__}: {error}"}
    return row | {"quantities": {name: asdict(q) for name, q in verdict.quantities.items()}}


def _read(path: Path, seed: int) -> dict[int, dict[str, Any]]:
    """The rows of an earlier run of the same campaign; a last line that was cut short is left out."""
    rows: dict[int, dict[str, Any]] = {}
    if not path.exists():
        return rows
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            if row["seed"] == seed:
                rows[row["index"]] = row
    return rows


def campaign(
    problems: int, out: Path, *, seed: int = 0, minutes: float | None = None, impls: Sequence[str] = tuple(ALL)
) -> dict[str, Any]:
    """Judges `problems` random problems, or as many as `minutes` allow, and writes what it found; returns the summary.

    `torch_compile` takes part with one problem in a hundred, of few shapes, because each shape is a compilation.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    out.mkdir(parents=True, exist_ok=True)
    path = out / "rows.jsonl"
    rows = _read(path, seed)
    cut_short = path.exists() and not path.read_text().endswith("\n")
    compiled = tuple(k.impl for k in COMPILED[:1] if k.impl in impls)
    others = tuple(name for name in impls if name not in compiled)
    start = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with path.open("a") as file, Progress(*columns) as bar, contextlib.suppress(KeyboardInterrupt):
        task = bar.add_task("problems", total=problems, completed=sum(i < problems for i in rows))
        failures = 0
        file.write("\n" * cut_short)
        for index in range(problems):
            if minutes is not None and time.monotonic() - start > 60 * minutes:
                break
            if index in rows:
                continue
            row = _row(index, seed, compiled if compiled and (index % 100 == 99 or not others) else others)
            rows[index] = row | {"seed": seed}
            file.write(json.dumps(rows[index]) + "\n")
            failures += not _holds(row)
            bar.update(task, advance=1, description=f"problems, {failures} failures")
    found = summary([rows[i] for i in sorted(rows) if i < problems], seed)
    (out / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "index.md").write_text(_page(found))
    return found


def _holds(row: dict[str, Any]) -> bool:
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


def summary(rows: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    """What a campaign found, with where it comes from."""
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {"variant": defaultdict(list), "dtype": defaultdict(list)}
    for row in rows:
        knobs = {"impl": Knobs.impl, "e_dtype": Knobs.e_dtype, "c_dtype": Knobs.c_dtype} | row["knobs"]
        groups["variant"][knobs["impl"]].append(row)
        e, c = knobs["e_dtype"], knobs["c_dtype"]
        groups["dtype"][e if c in ("same", e) else "mixed"].append(row)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    return {
        "command": f"python -m cce_precision.analysis.fuzz --problems {len(rows)} --seed {seed}",
        "commit": commit.strip() or None,
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "problems": len(rows),
        "violations": [row for row in rows if not _holds(row)],
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


def _page(found: dict[str, Any]) -> str:
    """The summary as a page."""
    number = lambda x: "-" if x is None else f"{x:.3g}"  # noqa: E731
    bad = len(found["violations"])
    lines = [
        f"# {found['problems']} random problems: {bad or 'no'} error{'s' if bad != 1 else ''} above the bound",
        "",
        "Every output and gradient of `linear_cross_entropy` against the truth, |out - truth| <= bound + radius",
        "elementwise, over all variants, dtypes and options. Bound / error is the ratio of Frobenius norms, its median",
        f"over all quantities {number(found['median bound / error'])}. Zero rejected: the share of nonzero quantities",
        "whose norm exceeds that of their bound, so that zeros in their place would not pass.",
        "",
        f"`{found['command']}`, commit {found['commit']}, PyTorch {found['torch']}, {found['cpu']}.",
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


def main() -> None:
    parser = argparse.ArgumentParser(description="Random problems against derived bounds.")
    parser.add_argument("--problems", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=None, help="stop after this long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", default=",".join(ALL), help="names, separated by commas")
    parser.add_argument("--out", type=Path, default=Path("reports/fuzz"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = campaign(
        given.problems, given.out, seed=given.seed, minutes=given.minutes, impls=tuple(given.variants.split(","))
    )
    print((given.out / "index.md").read_text())
    sys.exit(1 if found["violations"] else 0)


if __name__ == "__main__":
    main()
