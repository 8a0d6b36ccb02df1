"""The table of costs and errors that predictions rest on, fitted to committed reports.

    python -m cce_precision.analysis.choose_table

writes cce_precision/data/costs.json, and reports/choose/summary.json: how choices by measurement and by prediction did.

From `reports/choose/problems.jsonl` (random problems on a CPU) and `errors.jsonl` (`choose_check` on a GPU), the rows
of `cce-precision bench` in `reports/h200` and `reports/choose/h200`, and `reports/readme/results.parquet` (captured
heads).
Run it again when one of them changes; a test holds the committed table against them.

Times and memory are fitted by least squares of relative deviations with coefficients that are not negative, few of
them where shapes are few. A time has at least the products that its variant cannot do without (`products`); memory is
raised so that no measurement exceeds it. Errors, by dtype, variant and kind of softmax: of the loss the largest
measured, of dE and dC the upper end of a 95 % prediction interval for one more problem (`prediction_interval`, as for
one more draw in `choose.measured`). The largest of m alike is exceeded by one more with probability 1 / (m + 1).
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from cce_precision import numerics
from cce_precision.analysis import bench, choose_campaign
from cce_precision.analysis.sampled_statistics import prediction_interval
from cce_precision.choosing import FEWEST_TOKENS, MIB, Choice, Table, choose
from cce_precision.numerics import auto_eps
from cce_precision.variants import ALL, get

__all__ = ["fit", "foretold", "make", "observations", "products"]

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "cce_precision" / "data" / "costs.json"
KINDS = {"init": "flat", "trained": "peaked", "confident": "peaked", "captured": "diffuse"}
LONG = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
TIME = ("product", "logits_ps", "width_ps", "fixed_ms")
MEMORY = ("logits_bytes", "classifier_bytes", "embeddings_bytes", "vocabulary_bytes", "fixed_bytes")
ENOUGH = 6  # shapes, from which all coefficients are fitted

Row = dict[str, Any]


# -- observations: one variant on one problem --------------------------------------------------------------------------


def _of_problem(row: Row) -> Iterable[Row]:
    """Observations of one problem of the campaign."""
    shared = {key: row[key] for key in ("n", "v", "d", "kind", "index")}
    for impl, one in row["variants"].items():
        yield shared | {
            "backend": "eager", "dtype": LONG[row["dtype"]], "impl": impl, "one_pass": False,
            "product_ms": row["product_ms"], "time_ms": one["time_ms"], "memory_mib": one.get("memory_mib"),
            "errors": {k: one[k] for k in ("loss", "dE", "dC")}, "device": row["device"],
        }  # fmt: skip


def _is_one_pass(impl: str, workspace: int, row: Row) -> bool:
    """Whether the benchmark's method ran in one pass."""
    token = 2 * row["v"] + 8 * (row["v"] // 256 + 1) + 2 * row["d"]
    least = 4 * row["v"] * row["d"] + 6 * row["n"] * row["d"] + token * min(row["n"], FEWEST_TOKENS)
    exact = get(impl).label_apart and not get(impl).filtered and get(impl).operand is numerics.Operand.INPUT
    return exact and row["dtype"] == "bf16" and row["softcap"] is None and workspace * MIB >= least


def _of_bench(folder: Path) -> Iterable[Row]:
    """Observations of a folder of `cce-precision bench`."""
    rows = bench.read(folder)
    key = ("n", "v", "d", "softcap", "dtype", "case", "device")
    products = {tuple(r[k] for k in key): r["time_ms"] for r in rows if r["kind"] == "product"}
    backward = {(tuple(r[k] for k in key), r["method"]): r["time_ms"] for r in rows if r["kind"] == "loss-bw"}
    for row in rows:
        if row["kind"] != "loss-fw-bw" or row["family"] != "ours" or row["status"] != "ok" or not row["rounds"]:
            continue
        where = tuple(row[k] for k in key)
        name, _, workspace = row["method"].partition("@")
        match = re.fullmatch(r"(\d+)MB", workspace)
        if workspace and match is None:  # a variant with other settings than its record's
            continue
        one_pass = match is not None and _is_one_pass(name, int(match[1]), row)
        kind = "diffuse" if row["case"].endswith(".safetensors") else KINDS.get(row["case"])
        if kind is None or (match is not None and not one_pass):
            continue
        # one pass of more than 2 D tokens that left its products to the backward pass kept all powers, for which no
        # choice asks the room
        if match is not None and row["n"] >= 2 * row["d"] and 2 * backward[where, row["method"]] > row["time_ms"]:
            continue
        product = products[where]
        yield {
            "n": row["n"], "v": row["v"], "d": row["d"], "kind": kind, "impl": name, "one_pass": one_pass,
            "backend": "eager" if row["device"].startswith("CPU") else "triton", "dtype": LONG[row["dtype"]],
            "product_ms": {LONG[row["dtype"]]: product}, "time_ms": row["time_ms"], "memory_mib": row["peak_mib"],
            "errors": {k: row[f"{k}_error"] for k in ("loss", "dE", "dC")}, "device": row["device"],
        }  # fmt: skip


def _of_report(path: Path) -> Iterable[Row]:
    """Errors of the report on captured heads, at the automatic threshold."""
    import pandas as pd

    frame = pd.read_parquet(path)
    frame = frame[(frame.metric == "rel") & frame.quantity.isin(["dE", "dC"]) & (frame.case == "captured")]
    for (stage, impl, dtype, seed), part in frame.groupby(["stage", "variant", "dtype", "seed"]):
        if impl not in ALL:
            continue
        eps = auto_eps(getattr(torch, LONG[dtype]))
        part = part[part.eps.isna() | (part.eps == eps)]
        found = dict(zip(part.quantity, part.value, strict=True))
        if set(found) == {"dE", "dC"}:
            yield {
                "n": int(part.n.iloc[0]), "v": int(part.v.iloc[0]), "d": int(part.d.iloc[0]), "impl": impl,
                "kind": "flat" if stage == "initial" else "diffuse", "dtype": LONG[dtype], "one_pass": False,
                "errors": {"loss": 0.0, **found}, "time_ms": None, "seed": seed,
            }  # fmt: skip


def _of_check(path: Path) -> Iterable[Row]:
    """Errors that `choose_check` measured on a GPU."""
    for line in path.read_text().splitlines() if path.exists() else ():
        row = json.loads(line)
        shared = {key: row[key] for key in ("n", "v", "d", "kind", "impl", "one_pass")}
        errors = {k: row[k] for k in ("loss", "dE", "dC")}
        yield shared | {"dtype": LONG[row["dtype"]], "errors": errors, "time_ms": None}


def observations(problems: Path, check: Path, folders: Sequence[Path], report: Path) -> list[Row]:
    """All that the sources say."""
    lines = problems.read_text().splitlines() if problems.exists() else []
    found = [one for line in lines for one in _of_problem(json.loads(line))]
    found += _of_check(check)
    for folder in folders:
        found += _of_bench(folder)
    return [*found, *_of_report(report)] if report.exists() else found


# -- fits --------------------------------------------------------------------------------------------------------------


def products(impl: str, one_pass: bool) -> int:
    """Logits products whose time a step of a variant takes at least: the logits, and again in the backward pass of a
    tiled one, then dE and dC, of which a tile filter may skip all. Stored logits: one, because a CPU multiplies 16-bit
    matrices several times faster in one layout than in another."""
    variant = get(impl)
    if variant.path is not numerics.Path.TILED:
        return 1
    if one_pass:
        return 3
    return 2 if variant.filter_e.by_tile and variant.filter_c.by_tile else 3 if variant.filter_e.by_tile else 4


def fit(
    features: Sequence[Sequence[float]], target: Sequence[float], most: int, least: Sequence[float] | None = None
) -> tuple[list[float], float]:
    """(coefficients, largest relative deviation) of the best fit with at most `most` of the features, coefficients not
    below `least` (0)."""
    x, y = (torch.tensor(part, dtype=torch.float64) for part in (features, target))
    lowest = torch.zeros(x.shape[1], dtype=torch.float64) if least is None else torch.tensor(least, dtype=torch.float64)
    scaled = x / y[:, None]
    rest = (1 - scaled @ lowest)[:, None]
    best, error = lowest, float(rest.square().sum())
    for count in range(1, most + 1):
        for subset in map(list, itertools.combinations(range(x.shape[1]), count)):
            part = scaled[:, subset]
            size = part.square().sum(0).sqrt()
            if bool((size == 0).any()):
                continue
            more = torch.linalg.lstsq(part / size, rest).solution[:, 0] / size
            left = float((part @ more - rest[:, 0]).square().sum())
            if bool((more >= 0).all()) and left < 0.98 * error:  # a coefficient more must be worth it
                error, best = left, lowest.index_add(0, torch.tensor(subset), more)
    return best.tolist(), float((scaled @ best - 1).abs().max())


def _digits(x: float) -> float:
    return float(f"{x:.4g}")


def _cost(key: tuple[str, str, str, bool], rows: list[Row]) -> Row | None:
    """The cost of one variant from its timed observations; None where the product in its dtype was not timed."""
    backend, dtype, impl, one_pass = key
    tiled = get(impl).path is numerics.Path.TILED
    product_dtype = "float32" if backend == "eager" and tiled else dtype
    rows = [row for row in rows if product_dtype in row["product_ms"]]
    if not rows:
        return None
    shapes = len({(row["n"], row["v"], row["d"]) for row in rows})
    size = [(row["n"], row["v"], row["d"]) for row in rows]
    work = [
        (row["product_ms"][product_dtype], n * v / 1e9, (n + v) * d / 1e9, 1.0)
        for row, (n, v, d) in zip(rows, size, strict=True)
    ]
    if shapes < ENOUGH:  # on a GPU: products and what the logits' memory costs
        work = [(a, b if shapes > 1 else 0.0, 0.0, 0.0) for a, b, *_ in work]
    least = (float(products(impl, one_pass)), 0.0, 0.0, 0.0)
    time, off = fit(work, [row["time_ms"] for row in rows], len(TIME), least)
    held = [
        (row, shape)
        for row, shape in zip(rows, size, strict=True)
        if row["memory_mib"] is not None and math.isfinite(row["memory_mib"])
    ]
    bytes_of = getattr(torch, dtype).itemsize
    scratch = [max(1.0, row["memory_mib"] * MIB - bytes_of * (n + v) * d) for row, (n, v, d) in held]
    parts = [(float(n * v), float(v * d), float(n * d), float(v), 1.0) for _, (n, v, d) in held]
    memory, _ = fit(parts, scratch, len(MEMORY) if shapes >= ENOUGH else 1)
    over = max(y / sum(a * b for a, b in zip(memory, x, strict=True)) for x, y in zip(parts, scratch, strict=True))
    return {
        "backend": backend, "dtype": dtype, "impl": impl, "one_pass": one_pass, "product_dtype": product_dtype,
        **{name: _digits(value) for name, value in zip(TIME, time, strict=True)},
        **{name: _digits(value * max(1.0, over) * 1.001) for name, value in zip(MEMORY, memory, strict=True)},
        "rows": len(rows), "time_error": _digits(off),
    }  # fmt: skip


def make(found: Sequence[Row], sources: Sequence[Row], command: str) -> Row:
    """The table, as JSON holds it."""
    timed: dict[tuple[str, str, str, bool], list[Row]] = {}
    errors: dict[tuple[str, str, bool, str], list[Row]] = {}
    speeds: dict[str, dict[str, list[float]]] = {}
    devices: dict[str, dict[str, None]] = {}
    for row in found:
        errors.setdefault((row["dtype"], row["impl"], row["one_pass"], row["kind"]), []).append(row)
        if row["time_ms"] is None:
            continue
        timed.setdefault((row["backend"], row["dtype"], row["impl"], row["one_pass"]), []).append(row)
        devices.setdefault(row["backend"], {})[row["device"]] = None
        for dtype, ms in row["product_ms"].items():
            rate = 2 * row["n"] * row["v"] * row["d"] / ms / 1e9
            speeds.setdefault(row["backend"], {}).setdefault(dtype, []).append(rate)
    costs = [cost for key, rows in sorted(timed.items()) if (cost := _cost(key, rows))]
    return {
        "made_by": command,
        "sources": list(sources),
        "devices": {
            backend: {
                "device": ", ".join(names),
                "product_tflops": {d: _digits(statistics.median(x)) for d, x in sorted(speeds[backend].items())},
            }
            for backend, names in sorted(devices.items())
        },
        "costs": costs,
        "errors": [
            {
                "dtype": dtype, "impl": impl, "one_pass": one_pass, "case": kind,
                "loss": _digits(max(row["errors"]["loss"] for row in rows)),
                **{x: _digits(prediction_interval([row["errors"][x] for row in rows])[1]) for x in ("dE", "dC")},
                "vocabulary": max(row["v"] for row in rows), "tokens": max(row["n"] for row in rows), "rows": len(rows),
            }
            for (dtype, impl, one_pass, kind), rows in sorted(errors.items())
        ],
    }  # fmt: skip


def foretold(rows: Sequence[Row], table: Table, told: bool = False) -> Row:
    """How choices by prediction from `table` would have done on rows of the campaign, with the products timed there;
    `told`: given each problem's kind of softmax."""
    return _score([(row, _predicted(row, table, told)) for row in rows])


def _score(done: Sequence[tuple[Row, Choice]]) -> Row:
    missed, ratios, none = [], [], 0
    for row, choice in done:
        variants = row["variants"]
        able = [name for name, one in variants.items() if _passes(one, row["tolerance"], variants["baseline"])]
        if choice.best is None:
            none += 1
            continue
        if choice.best.impl not in able:
            missed.append(row["index"])
        else:
            fastest = min(variants[name]["time_ms"] for name in able)
            ratios.append(variants[choice.best.impl]["time_ms"] / fastest)
    ratios.sort()
    return {
        "problems": len(done), "none_predicted_to_meet": none, "chosen": len(done) - none, "meets": len(ratios),
        "missed": missed, "within": sum(r <= choose_campaign.WITHIN for r in ratios),
        "ratio": {f"{q:g}": ratios[round(q * (len(ratios) - 1))] for q in (0.5, 0.9, 0.95, 1)} if ratios else {},
    }  # fmt: skip


def held_out(rows: Sequence[Row], told: bool = False) -> Row:
    """`foretold` for each half of the campaign's problems by a table that is made from the other half alone."""
    halves = [[row for row in rows if row["index"] % 2 == k] for k in (0, 1)]
    done = []
    for mine, others in (halves, halves[::-1]):
        table = Table(make([one for row in others for one in _of_problem(row)], [], ""))
        done += [(row, _predicted(row, table, told)) for row in mine]
    return _score(done)


def _predicted(row: Row, table: Table, told: bool) -> Choice:
    speeds = {name: 2 * row["n"] * row["v"] * row["d"] / ms / 1e9 for name, ms in row["product_ms"].items()}
    dtype = getattr(torch, LONG[row["dtype"]])
    return choose(
        row["n"], row["v"], row["d"], dtype=dtype, device="cpu", tolerance=row["tolerance"],
        softmax=row["kind"] if told else None, tflops=speeds, table=table,
    )  # fmt: skip


def _passes(one: Row, tolerance: float | None, limit: Row) -> bool:
    from cce_precision.choosing import Errors

    mine, other = (Errors(x["loss"], x["dE"], x["dC"]) for x in (one, limit))
    return mine.gradient <= tolerance if tolerance is not None else mine.no_worse_than(other)


def source(path: Path) -> Row:
    """A file behind the table: its name and the digest by which a change shows."""
    name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    return {"file": str(name), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=Path, default=ROOT / "reports/choose/problems.jsonl")
    parser.add_argument("--check", type=Path, default=ROOT / "reports/choose/errors.jsonl")
    parser.add_argument("--bench", type=Path, nargs="*", default=[ROOT / "reports/h200", ROOT / "reports/choose/h200"])
    parser.add_argument("--report", type=Path, default=ROOT / "reports/readme/results.parquet")
    parser.add_argument("--out", type=Path, default=TARGET)
    given = parser.parse_args()
    folders = [folder for folder in given.bench if (folder / "rows.jsonl").exists()]
    files = [p for p in (given.problems, given.check, *(f / "rows.jsonl" for f in folders), given.report) if p.exists()]
    data = make(
        observations(given.problems, given.check, folders, given.report), [source(p.resolve()) for p in files],
        "python -m cce_precision.analysis.choose_table",
    )  # fmt: skip
    given.out.write_text(json.dumps(data, indent=1) + "\n")
    rows = [json.loads(line) for line in given.problems.read_text().splitlines()]
    found = {"choices": choose_campaign.summary(rows), "predictions": held_out(rows), "told": held_out(rows, told=True)}
    (given.problems.parent / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"{given.out}: {len(data['costs'])} costs, {len(data['errors'])} errors from {len(files)} files")


if __name__ == "__main__":
    main()
