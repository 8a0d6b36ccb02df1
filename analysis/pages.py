"""The pages: one document (page.html, page.css, page.js) that every page's template extends, and one way to write it.

A page is one file that loads nothing: styles, scripts and pictures stand in it. Where scripts run plotly draws its
figures, else the pictures of matplotlib show. Either package may be missing, for a benchmark on a bare machine.
"""

from __future__ import annotations

import base64
import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup, escape

from cce_precision.analysis.drawing import draw, plotly_figure
from cce_precision.analysis.figures import Figure

__all__ = ["picture", "write"]


def _raised(text: str) -> Markup:
    """HTML of a text, its powers such as 2^-12 with a raised exponent."""
    return Markup(re.sub(r"(\d+)\^(-?\d+)", r'<span class="power">\1<sup>\2</sup></span>', str(escape(text))))


def _source(name: str) -> Markup:
    """A file of templates/ as it is: styles and scripts are no templates, whatever braces they hold."""
    return Markup(TEMPLATES.get_source(PAGES, name)[0])


TEMPLATES = PackageLoader("cce_precision.analysis")
PAGES = Environment(loader=TEMPLATES, autoescape=True, trim_blocks=True, lstrip_blocks=True)
PAGES.filters["power"] = _raised
PAGES.globals["source"] = _source


def picture(figure: Figure, *files: Path) -> dict[str, str]:
    """What the macro of this name shows. files: where the drawing is kept, the first as SVG."""
    image = ""
    if find_spec("matplotlib"):
        with tempfile.TemporaryDirectory() as folder:
            files = files or (Path(folder) / "figure.svg",)
            draw(figure, *files)
            image = "data:image/svg+xml;base64," + base64.b64encode(files[0].read_bytes()).decode()
    return {"name": figure.name, "title": figure.title, "caption": figure.caption, "image": image}


def write(
    out: Path,
    template: str,
    figures: Iterable[Figure] = (),
    views: Mapping[str, Iterable[Figure]] | None = None,
    main: int = 0,
    **values: Any,
) -> Path:
    """Writes `out`/index.html, the template with these values, and returns its path.

    figures: what plotly draws in the picture of that name. views: the same for figures that a page shows in turns, by
    the label of the button that chooses them, view `main` at first.
    """

    def drawn(some: Iterable[Figure]) -> dict[str, Any]:
        return {figure.name: plotly_figure(figure) for figure in some}

    shown = [{"label": label, "figures": drawn(some)} for label, some in (views or {}).items()]
    live = {"fixed": drawn(figures), "views": shown, "main": main}
    plotly = ""
    if (live["fixed"] or shown) and find_spec("plotly"):
        from plotly.offline import get_plotlyjs

        plotly = Markup(get_plotlyjs())
    data = json.dumps(live, separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
    path = out / "index.html"
    page = PAGES.get_template(template).render(values, live=Markup(data), plotly=plotly)
    path.write_text(page, encoding="utf-8")
    return path
