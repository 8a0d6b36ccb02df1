"""What the benchmark shows: a table on the screen, and one page that works offline with the time-memory-error
picture."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from cce_precision.analysis import pages
from cce_precision.analysis.bench_job import FLOOR, PRODUCT, Row
from cce_precision.analysis.figures import Figure, Level, Panel, Series, give_marks

__all__ = ["picture", "table", "write"]

HEADINGS = (
    "method", "fw ms", "bw ms", "fw+bw ms", "+-", "fw/G", "fw+bw/G", "graph/G", "MiB fw", "MiB fw+bw",
    "loss error", "dE error", "dC error", "note",
)  # fmt: skip

MOST_JOBS = 3  # of a shape; with more it has been swept


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or math.isnan(value) else format(value, form)


def _lines(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """One line a method, in the order of `HEADINGS`."""
    methods: dict[str, dict[str, Row]] = {}
    for row in rows:
        methods.setdefault(row["method"], {})[row["kind"]] = row
    lines = []
    for name, kinds in methods.items():
        fw, bw = kinds.get("loss-fw", {}), kinds.get("loss-bw", {})
        full = kinds.get("loss-fw-bw") or kinds["product"]
        note = "" if full["status"] == "ok" else f"{full['status']}: {full['reason']}"
        if name == PRODUCT:
            fw, full = full, full | dict.fromkeys(("time_ms", "spread_ms", "times_product"))
        lines.append(
            (
                name,
                *(_number(kind.get("time_ms"), ".2f") for kind in (fw, bw, full)),
                _number(full["spread_ms"], ".2f"),
                *(_number(kind.get("times_product"), ".2f") for kind in (fw, full)),
                _number(full.get("graph_product"), ".2f"),
                *(_number(kind.get("peak_mib"), ",.1f") for kind in (fw, full)),
                *(_number(full[f"{what}_error"], ".2e") for what in ("loss", "dE", "dC")),
                note,
            )
        )
    return lines


def _title(row: Row) -> str:
    cap = f", softcap {row['softcap']:g}" if row["softcap"] else ""
    size = f"N={row['n']}, V={row['v']}, D={row['d']}{cap}"
    return f"{row['shape']}: {size}, {row['dtype']}, {row['case']}, {row['device']}"


def table(rows: list[Row]) -> Any:
    """The rows of one job as a rich table."""
    from rich import box
    from rich.table import Table

    drawn = Table(title=_title(rows[0]), title_justify="left", box=box.SIMPLE, padding=0)
    for heading in HEADINGS:
        text = heading in ("method", "note")
        drawn.add_column(heading, justify="left" if text else "right", no_wrap=heading != "note")
    for line in _lines(rows):
        drawn.add_row(*line)
    return drawn


def _jobs(rows: Iterable[Row]) -> tuple[list[list[Row]], list[list[Row]]]:
    """The rows of each job: those of shapes with few of them, in their order, and those of swept shapes, by size."""
    jobs: dict[str, list[Row]] = {}
    for row in rows:
        jobs.setdefault(_title(row), []).append(row)
    shapes = Counter(job[0]["shape"] for job in jobs.values())
    few = [job for shape in shapes if shapes[shape] <= MOST_JOBS for job in jobs.values() if job[0]["shape"] == shape]
    swept = [job for job in jobs.values() if shapes[job[0]["shape"]] > MOST_JOBS]
    return few, sorted(swept, key=lambda job: (job[0]["shape"], job[0]["v"], job[0]["n"]))


def picture(rows: list[Row]) -> Figure:
    """Time against memory, and time against the error of either gradient, a point a method."""
    full = [r for r in rows if r["kind"] == "loss-fw-bw" and r["rounds"]]
    floor = next((r for r in rows if r["method"] == FLOOR), None)

    def note(r: Row) -> str:
        return (
            f"{r['time_ms']:.1f} ms = {r['times_product']:.2f} products"
            f" ({_number(r.get('graph_product'), '.2f')} as a CUDA graph)<br>{r['peak_mib']:,.0f} MiB<br>"
            f"error of dE {r['dE_error']:.2e}, of dC {r['dC_error']:.2e}"
        )

    def panel(title: str, key: str, label: str) -> Panel:
        return Panel(
            title,
            "time / logits product",
            label,
            tuple(Series(r["method"], (r["times_product"],), (r[key],), (note(r),)) for r in full if r[key] > 0),
            (Level(FLOOR, floor[key]),) if floor and floor[key] > 0 else (),
        )

    return Figure(
        "time-memory-error",
        _title(rows[0]),
        "Each point is a method, its time that of loss and gradients: further left is faster, further down is smaller "
        "or more exact. The line is the least that any method can have: gradients in memory, and their rounding.",
        (
            panel("memory", "peak_mib", "peak extra memory, MiB"),
            panel("error of dE", "dE_error", "relative error of dE"),
            panel("error of dC", "dC_error", "relative error of dC"),
        ),
    )


def _growth(rows: list[Row]) -> list[Figure]:
    """How time and memory grow with N and with V, where rows of one shape were measured at three sizes or more."""
    full = [r for r in rows if r["kind"] == "loss-fw-bw" and r["rounds"]]
    drawn = []
    for axis, other, name in (("n", "v", "tokens N"), ("v", "n", "vocabulary V")):
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in full:
            fixed = tuple(row[k] for k in ("shape", other, "d", "dtype", "case", "device"))
            groups.setdefault(fixed, []).append(row)
        for group in groups.values():
            if len({row[axis] for row in group}) < 3:
                continue
            curves: dict[str, list[Row]] = {}
            for row in sorted(group, key=lambda r: r[axis]):
                curves.setdefault(row["method"], []).append(row)
            panels = tuple(
                Panel(
                    title,
                    name,
                    label,
                    tuple(
                        Series(
                            method,
                            tuple(r[axis] for r in points),
                            tuple(r[key] for r in points),
                            tuple(f"{name} {r[axis]:,}: {r[key]:,.1f}" for r in points),
                        )
                        for method, points in curves.items()
                    ),
                )
                for title, key, label in (("time", "time_ms", "ms"), ("memory", "peak_mib", "peak extra memory, MiB"))
            )
            first = group[0]
            rest = f"{other.upper()}={first[other]}, D={first['d']}, {first['dtype']}, {first['case']}"
            drawn.append(Figure(f"growth-{axis}", f"{first['shape']}: growth with {name} ({rest})", "", panels))
    return drawn


def _best(rows: list[Row]) -> list[tuple[str, str, str]]:
    """The fastest, the smallest and the most exact method of one job, each with what it measured."""
    full = [r for r in rows if r["kind"] == "loss-fw-bw" and r["rounds"]]
    if not full:
        return []

    def worst_error(r: Row) -> float:
        return max(r["dE_error"], r["dC_error"])

    fastest, smallest, exact = (
        min(full, key=key) for key in (lambda r: r["time_ms"], lambda r: r["peak_mib"], worst_error)
    )
    return [
        ("Fastest", fastest["method"], f"{fastest['time_ms']:.1f} ms, {fastest['times_product']:.2f} products"),
        ("smallest", smallest["method"], f"{smallest['peak_mib']:,.0f} MiB"),
        ("most exact", exact["method"], f"gradients off by at most {worst_error(exact):.2e}"),
    ]


def write(rows: list[Row], out: Path) -> Path:
    """Writes `out`/index.html and returns its path; beside it the first picture, as SVG and PNG."""
    import cce_precision.analysis.bench as bench

    give_marks(row["method"] for row in rows if row["kind"] == "loss-fw-bw")
    few, swept = _jobs(rows)
    jobs = few + swept
    drawn = filter(None, (*map(picture, few), *_growth(rows), *map(picture, swept)))
    figures = [replace(figure, name=f"{figure.name}-{i}") for i, figure in enumerate(drawn)]  # a name of its own each
    kept = [out / f"time-memory-error.{kind}" for kind in ("svg", "png")]
    runs = dict.fromkeys(f"commit {row['commit']}, {row['measured_at']}" for row in rows)
    made = f"{rows[0]['device']}; {rows[0]['versions']}; {'; '.join(runs)}. A time's unit is the product in its run."
    return pages.write(
        out,
        "bench.html",
        figures,
        pictures=[pages.picture(figure, *(() if i else kept)) for i, figure in enumerate(figures)],
        headings=[heading.replace("+-", "±") for heading in HEADINGS],
        jobs=[{"title": _title(job[0]), "best": _best(job), "lines": _lines(job)} for job in jobs],
        method=(bench.__doc__ or "").strip(),
        commands=dict.fromkeys(row["command"] for row in rows),
        made=made,
    )
