"""What the benchmark shows: a table on the screen, and one page that works offline with the time-memory-error
picture."""

from __future__ import annotations

import html
import json
import math
import tempfile
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cce_precision.analysis.bench_job import FLOOR, PRODUCT, Row

__all__ = ["picture", "table", "write"]

HEADINGS = (
    "method", "fw ms", "bw ms", "fw+bw ms", "+-", "fw/G", "fw+bw/G", "graph/G", "MiB fw", "MiB fw+bw",
    "loss error", "dE error", "dC error", "note",
)  # fmt: skip


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


def _jobs(rows: Iterable[Row]) -> list[list[Row]]:
    jobs: dict[str, list[Row]] = {}
    for row in rows:
        jobs.setdefault(_title(row), []).append(row)
    return list(jobs.values())


def picture(rows: list[Row]) -> Any:
    """Time against memory, and time against the error of either gradient, a point a method; a `figures.Figure`."""
    from cce_precision.analysis.figures import Figure, Level, Panel, Series

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


def _growth(rows: list[Row]) -> list[Any]:
    """How time and memory grow with N and with V, where rows of one shape were measured at three sizes or more."""
    from cce_precision.analysis.figures import Figure, Panel, Series

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


STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1f2328; max-width: 1200px; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px }
th, td { padding: .25rem .55rem; white-space: nowrap; border-bottom: 1px solid #e3e6ea; text-align: right }
th:first-child, td:first-child, th:last-child, td:last-child { text-align: left; white-space: normal } .table {
overflow-x: auto } .reason { color: #57606a } svg, img { max-width: 100%; height: auto } pre { white-space: pre-wrap;
background: #f6f8fa; padding: .6rem }
"""
SCRIPT = """
for (const [i, f] of FIGURES.entries()) {
  const box = document.getElementById("figure-" + i);
  box.replaceChildren();
  const layout = () => window.innerWidth < 800 ? f.narrow : f.wide;
  Plotly.newPlot(box, f.data, layout(), {responsive: true, displaylogo: false});
}
"""


def _html_table(rows: list[Row]) -> str:
    head = "".join(f"<th>{html.escape(h.replace('+-', '±'))}</th>" for h in HEADINGS)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(x)}</td>" for x in line) + "</tr>" for line in _lines(rows))
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _static(figure: Any) -> str:
    """The figure as inline SVG, which is what shows without JavaScript."""
    from cce_precision.analysis.drawing import draw

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figure.svg"
        draw(figure, path)
        text = path.read_text()
    return text[text.index("<svg") :]


def _answer(rows: list[Row]) -> str:
    """The fastest, the smallest and the most exact method of one job, in one sentence."""
    full = [r for r in rows if r["kind"] == "loss-fw-bw" and r["rounds"]]
    if not full:
        return "No method passed its check."

    def best(key: Callable[[Row], float], form: Callable[[Row], str]) -> str:
        row = min(full, key=key)
        return f"<b>{html.escape(row['method'])}</b> ({form(row)})"

    def worst_error(r: Row) -> float:
        return max(r["dE_error"], r["dC_error"])

    fastest = best(lambda r: r["time_ms"], lambda r: f"{r['time_ms']:.1f} ms, {r['times_product']:.2f} products")
    smallest = best(lambda r: r["peak_mib"], lambda r: f"{r['peak_mib']:,.0f} MiB")
    exact = best(worst_error, lambda r: f"gradients off by at most {worst_error(r):.2e}")
    return f"Fastest: {fastest}; smallest: {smallest}; most exact: {exact}."


def write(rows: list[Row], out: Path) -> Path:
    """Writes `out`/index.html, self-contained. Without plotly the pictures do not move; without matplotlib they need
    plotly."""
    import cce_precision.analysis.bench as bench
    from cce_precision.analysis.drawing import plotly_figure
    from cce_precision.analysis.figures import give_marks

    give_marks(row["method"] for row in rows if row["kind"] == "loss-fw-bw")
    jobs = _jobs(rows)
    figures = [figure for figure in (*(picture(job) for job in jobs), *_growth(rows)) if figure]
    script = ""
    if find_spec("plotly"):
        from plotly.offline import get_plotlyjs

        data = json.dumps([plotly_figure(f) for f in figures]).replace("</", "<\\/")
        script = f"<script>{get_plotlyjs()}</script><script>const FIGURES = {data};{SCRIPT}</script>"

    def pictured(number: int, figure: Any) -> str:
        still = _static(figure) if find_spec("matplotlib") else ""
        title, caption = html.escape(figure.title), html.escape(figure.caption)
        return f'<h3>{title}</h3><p>{caption}</p><div id="figure-{number}">{still}</div>'

    first = rows[0]
    answers = "".join(f"<p>{html.escape(_title(job[0]))}. {_answer(job)}</p>" for job in jobs)
    tables = "".join(f"<h3>{html.escape(_title(job[0]))}</h3>{_html_table(job)}" for job in jobs)
    commands = "\n".join(dict.fromkeys(row["command"] for row in rows))
    runs = dict.fromkeys(f"commit {row['commit']}, {row['measured_at']}" for row in rows)
    made = f"{first['device']}; {first['versions']}; {'; '.join(runs)}. A time's unit is the product in its run."
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>cce_precision: time, memory and error</title><style>{STYLE}</style></head><body>
<h1>Time, memory and error of a step's loss and gradients</h1>
{answers}
<h2>Pictures</h2>{"".join(pictured(i, f) for i, f in enumerate(figures))}
<h2>Tables</h2>{tables}
<h2>Method</h2><pre>{html.escape((bench.__doc__ or "").strip())}</pre>
<h2>How to reproduce</h2><pre>{html.escape(commands)}</pre>
<p class="reason">{html.escape(made)}</p>
{script}</body></html>
"""
    path = out / "index.html"
    path.write_text(page)
    return path
