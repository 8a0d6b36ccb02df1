"""Two small renderers of a `Figure`: plotly's words for the page, matplotlib for PNG and SVG.

plotly's own image export drives a browser, which a machine may lack; matplotlib draws the same data anywhere.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cce_precision.analysis.figures import Figure, Panel, mark, text_colour

__all__ = ["draw", "plotly_figure"]

DPI = 144  # of a PNG
INK, GRID = "#1f2328", "#e3e6ea"
GAP, WIDE_GAP = 0.2, 0.27  # between panels: names of curves, or an axis' own; names of bars with their totals
LEGEND = {
    "orientation": "h",
    "yref": "container",
    "yanchor": "bottom",
    "y": 0,
    "xanchor": "left",
    "x": 0,
    "groupclick": "togglegroup",
}


def _extent(panel: Panel) -> tuple[float, float, float, float]:
    """x and y limits on the axes' own scales (log10 where logarithmic); y of a panel with categories counts them."""
    xs = [float(x) for s in panel.series for x in s.x]
    ys = (
        [float(y) for s in panel.series for y in s.y if not isinstance(y, str)]
        + [level.y for level in panel.levels]
        + [y for y, _ in panel.guides]
    )

    def limits(values: list[float], log: bool) -> tuple[float, float]:
        some = [math.log10(v) if log else v for v in values if math.isfinite(v) and (v > 0 or not log)]
        low, high = (min(some), max(some)) if some else (0.0, 1.0)
        room = 0.04 * (high - low) or 0.5
        return low - room, high + room

    x0, x1 = (0.0, 1.0) if panel.stacked else limits(xs, panel.log_x)
    y0, y1 = (len(panel.categories) - 0.5, -0.5) if panel.categories else limits(ys, panel.log_y)
    return x0, x1, y0, y1


def _spread(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The values, in their order, moved apart until neighbours are `gap` from each other, inside [low, high]."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    moved = list(values)
    for i, place in enumerate(order):  # upwards from below ...
        moved[place] = max(moved[place], low if i == 0 else moved[order[i - 1]] + gap)
    for i, place in reversed(list(enumerate(order))):  # ... and down again where that went too far
        moved[place] = min(moved[place], high if i == len(order) - 1 else moved[order[i + 1]] - gap)
    return moved


def _labels(panel: Panel) -> list[tuple[str, float]]:
    """(name, y) of what is named at the right end of a panel, on the axis' own scale, apart from each other."""
    _, _, y0, y1 = _extent(panel)
    ends = {level.name: level.y for level in panel.levels}
    if panel.named:
        ends |= {s.name: float(s.y[s.x.index(max(s.x))]) for s in panel.series if s.x}
    scaled = [(name, math.log10(y) if panel.log_y else y) for name, y in ends.items() if y > 0 or not panel.log_y]
    apart = _spread([y for _, y in scaled], 0.047 * (y1 - y0), y0, y1)
    return [(name, y) for (name, _), y in zip(scaled, apart, strict=True)]


def _log_ticks(low: float, high: float) -> tuple[tuple[float, str], ...]:
    """Ticks of a logarithmic axis between 10^low and 10^high: powers of ten, and some between where those are few."""
    span = high - low
    steps = (1, 2, 5) if span < 1.3 else (1, 3) if span < 2.6 else (1,)
    every = 1 if span < 9 else 2
    ticks = []
    for exponent in range(math.floor(low), math.ceil(high) + 1):
        for step in steps:
            place = exponent + math.log10(step)
            if low <= place <= high and exponent % every == 0:
                power = "1" if exponent == 0 else "10" if exponent == 1 else f"10^{exponent}"
                label = power if step == 1 else str(step * 10**exponent) if exponent in (0, 1) else f"{step}·{power}"
                ticks.append((10.0**place, label))
    return tuple(ticks)


def _shown(label: str) -> str:
    return re.sub(r"\^(-?\d+)", r"<sup>\1</sup>", label)


def _axis(title: str, log: bool, low: float, high: float, ticks: tuple[tuple[float, str], ...]) -> dict[str, Any]:
    axis: dict[str, Any] = {
        "title": {"text": title},
        "type": "log" if log else "linear",
        "range": [low, high],
        "gridcolor": GRID,
        "linecolor": INK,
        "showline": True,
        "ticks": "outside",
        "zeroline": False,
        "automargin": True,
    }
    if ticks:
        axis |= {
            "tickmode": "array",
            "tickvals": [t for t, _ in ticks],
            "ticktext": [_shown(text) for _, text in ticks],
        }
    return axis


def _ticks(panel: Panel) -> tuple[tuple[tuple[float, str], ...], tuple[tuple[float, str], ...]]:
    """Ticks of x and of y; empty: the renderer's own."""
    x0, x1, y0, y1 = _extent(panel)
    x = panel.ticks or (_log_ticks(x0, x1) if panel.log_x else ())
    return x, _log_ticks(y0, y1) if panel.log_y and not panel.categories else ()


def _plotly_traces(panel: Panel, axes: dict[str, str], seen: set[str]) -> list[dict[str, Any]]:
    x0, x1, _, _ = _extent(panel)
    ends = [10**x0, 10**x1] if panel.log_x else [x0, x1]
    traces: list[dict[str, Any]] = []

    def trace(name: str, **fields: Any) -> None:
        look = {"type": "scatter", "name": name, "legendgroup": name, "showlegend": name not in seen}
        traces.append(look | axes | fields)
        seen.add(name)

    for s in panel.series:
        look = mark(s.name)
        values = {"x": list(s.x), "y": list(s.y), "hovertemplate": "%{fullData.name}<br>%{customdata}<extra></extra>"}
        values["customdata"] = list(s.notes)
        if panel.stacked:
            trace(s.name, **values | {"type": "bar", "orientation": "h", "marker": {"color": look.colour}})
            continue
        trace(
            s.name,
            **values,
            mode="lines+markers",
            line={"color": look.colour, "width": 2},
            marker={"color": look.colour, "symbol": look.plotly, "size": 8},
        )
    for level in panel.levels:
        colour = mark(level.name).colour
        trace(
            level.name,
            x=ends,
            y=[level.y] * 2,
            mode="lines",
            line={"color": colour, "width": 1.5, "dash": level.dash},
            hovertemplate=f"{level.name}<br>{level.y:.3g}<extra></extra>",
        )
    for name, y in _labels(panel):
        trace(
            name,
            x=[ends[1]],
            y=[10**y if panel.log_y else y],
            mode="text",
            text=[" " + name.split(":")[0]],
            cliponaxis=False,
            textposition="middle right",
            hoverinfo="skip",
            textfont={"color": text_colour(name), "size": 11},
        )
    return traces


def _annotations(panel: Panel, suffix: str, domain: dict[str, list[float]]) -> list[dict[str, Any]]:
    """The panel's title over its upper left corner, and the names of its guides."""
    base = {"showarrow": False, "xanchor": "left", "yanchor": "bottom"}
    title = {"text": f"<b>{panel.title}</b>", "xref": "paper", "yref": "paper", "yshift": 4}
    title |= {"x": domain["x"][0], "y": domain["y"][1]}
    axes = {"xref": f"x{suffix} domain", "yref": f"y{suffix}", "x": 0.01, "font": {"size": 11}}
    guides = [axes | {"text": _shown(label), "y": math.log10(y) if panel.log_y else y} for y, label in panel.guides]
    return [base | note for note in (title, *guides)]


def _guides(panel: Panel, suffix: str) -> list[dict[str, Any]]:
    line = {"type": "line", "xref": f"x{suffix} domain", "x0": 0, "x1": 1, "yref": f"y{suffix}"}
    return [line | {"y0": y, "y1": y, "line": {"color": INK, "width": 1, "dash": "dot"}} for y, _ in panel.guides]


def _axes(panel: Panel, suffix: str) -> dict[str, dict[str, Any]]:
    x0, x1, y0, y1 = _extent(panel)
    x_ticks, y_ticks = _ticks(panel)
    x = _axis(panel.x, panel.log_x, x0, x1, x_ticks) | {"anchor": f"y{suffix}"}
    y = _axis(panel.y, panel.log_y and not panel.categories, y0, y1, y_ticks) | {"anchor": f"x{suffix}"}
    if panel.categories:
        y |= {"type": "category", "categoryorder": "array", "categoryarray": list(panel.categories), "ticks": ""}
    return {f"xaxis{suffix}": x, f"yaxis{suffix}": y}


def _domains(i: int, count: int, gap: float) -> dict[str, dict[str, list[float]]]:
    """Where panel i of `count` lies on a wide page (side by side) and on a narrow one (one below the other)."""
    width = (1 - gap * (count - 1)) / count
    height = (1 - GAP * (count - 1)) / count
    top = 1 - i * (height + GAP)
    across = {"x": [i * (width + gap), i * (width + gap) + width], "y": [0.0, 1.0]}
    return {"wide": across, "narrow": {"x": [0.0, 1.0], "y": [max(0.0, top - height), top]}}


def _has_legend(figure: Figure) -> bool:
    """Not where each series stands beside its own name."""
    return figure.panels[0].stacked or not figure.panels[0].categories


def plotly_figure(figure: Figure) -> dict[str, Any]:
    """`data` and two layouts, `wide` (panels side by side) and `narrow` (one below the other), for plotly.js."""
    data: list[dict[str, Any]] = []
    layouts: dict[str, dict[str, Any]] = {"wide": {}, "narrow": {}}
    seen: set[str] = set()
    count = len(figure.panels)
    for i, panel in enumerate(figure.panels):
        suffix = str(i + 1) if i else ""
        data += _plotly_traces(panel, {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"}, seen)
        for where, domain in _domains(i, count, WIDE_GAP if panel.stacked else GAP).items():
            axes = {name: axis | {"domain": domain[name[0]]} for name, axis in _axes(panel, suffix).items()}
            layouts[where] |= axes
            layouts[where].setdefault("annotations", []).extend(_annotations(panel, suffix, domain))
            layouts[where].setdefault("shapes", []).extend(_guides(panel, suffix))
    legend = len(seen) > 1 and _has_legend(figure)
    rows = {"wide": -(-len(seen) // 6), "narrow": -(-len(seen) // 2)}
    right = {"wide": 110 if any(_labels(panel) for panel in figure.panels) else 16, "narrow": 8}
    for where, layout in layouts.items():
        bottom = 64 + 24 * rows[where] * legend
        layout |= {
            "paper_bgcolor": "#ffffff",
            "plot_bgcolor": "#ffffff",
            "font": {"color": INK, "size": 13, "family": "system-ui, sans-serif"},
            "hovermode": "closest",
            "showlegend": legend,
            "barmode": "stack",
            "legend": LEGEND | {"font": {"size": 11 if where == "narrow" else 12}},
            "height": (420 if where == "wide" else 340 * count) + bottom,
            "margin": {"l": 56, "r": right[where], "t": 56, "b": bottom},
        }
    return {"data": data, **layouts}


def draw(figure: Figure, *paths: Path) -> None:
    """Writes the figure to each path with matplotlib; the ending (.png, .svg) decides the format."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings: dict[Any, Any] = {
        "figure.dpi": DPI,  # laid out as it is drawn
        "svg.fonttype": "none",
        "svg.hashsalt": figure.name,
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.edgecolor": INK,
        "text.color": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with plt.rc_context(settings):
        count = len(figure.panels)
        fig, axes = plt.subplots(
            1, count, figsize=(5.6 * count if count > 1 else 9.0, 4.6), squeeze=False, layout="constrained"
        )
        for panel, ax in zip(figure.panels, axes[0], strict=True):
            _draw_panel(panel, ax)
        found = [pair for ax in axes[0] for pair in zip(*ax.get_legend_handles_labels(), strict=True)]
        handles = {label: handle for handle, label in found}
        if len(handles) > 1 and _has_legend(figure):
            fig.legend(
                list(handles.values()), list(handles), loc="outside lower center", ncols=5, frameon=False, fontsize=9
            )
        fig.draw_without_rendering()
        fig.set_layout_engine(None)  # laid out once, for all files
        for path in paths:
            fig.savefig(path, dpi=DPI, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})
        plt.close(fig)


def _draw_panel(panel: Panel, ax: Any) -> None:
    x0, x1, y0, y1 = _extent(panel)
    ax.set_xscale("log" if panel.log_x else "linear")
    if not panel.categories:
        ax.set_yscale("log" if panel.log_y else "linear")
    position = {name: i for i, name in enumerate(panel.categories)}
    reached = [0.0] * len(panel.categories)
    for s in panel.series if panel.stacked else ():
        places = [position[str(y)] for y in s.y]
        ax.barh(places, s.x, left=[reached[i] for i in places], height=0.7, color=mark(s.name).colour, label=s.name)
        for i, x in zip(places, s.x, strict=True):
            reached[i] += float(x)
    for s in () if panel.stacked else panel.series:
        look = mark(s.name)
        ys = [position[y] if isinstance(y, str) else y for y in s.y]
        ax.plot(s.x, ys, color=look.colour, marker=look.matplotlib, markersize=5, linewidth=1.6, label=s.name)
    for level in panel.levels:
        ax.axhline(
            level.y,
            color=mark(level.name).colour,
            linewidth=1.2,
            linestyle={"dash": "--", "dot": ":", "solid": "-"}[level.dash],
        )
    for name, y in _labels(panel):
        at = (1.01, 10**y if panel.log_y else y)
        ax.annotate(
            name.split(":")[0], at, xycoords=("axes fraction", "data"), color=text_colour(name), fontsize=8, va="center"
        )
    for value, label in panel.guides:
        ax.axhline(value, color=INK, linewidth=0.8, linestyle=":")
        ax.annotate(_tex(label), (0.01, value), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
    ax.set_xlim(*((10**x0, 10**x1) if panel.log_x else (x0, x1)))
    ax.set_ylim(*((10**y0, 10**y1) if panel.log_y and not panel.categories else (y0, y1)))
    for axis, ticks in zip((ax.xaxis, ax.yaxis), _ticks(panel), strict=True):
        if ticks:
            axis.set_ticks([t for t, _ in ticks], [_tex(label) for _, label in ticks])
            axis.minorticks_off()
    if panel.categories:
        ax.set_yticks(range(len(panel.categories)), panel.categories)
    ax.set_title(panel.title, loc="left", fontsize=10.5, fontweight="bold")
    ax.set_xlabel(panel.x)
    ax.set_ylabel(panel.y)
    ax.grid(color=GRID, linewidth=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _tex(label: str) -> str:
    return re.sub(r"(\d+)\^(-?\d+)", r"$\1^{\2}$", label)
