"""The report: figures and page from a table, the answer, and the README's block that must agree with its table."""

from __future__ import annotations

import itertools
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from cce_precision.analysis import drawing, figures, report, report_compare, sweep
from cce_precision.analysis.budget_stages import STAGES
from cce_precision.analysis.figures import View
from cce_precision.variants import ALL

ROOT = Path(__file__).parent.parent
VIEW = View("captured", "trained", "bf16")


def made_up_table(variants: tuple[str, ...] = ("baseline", "cce", "cce_exact", "cce_unbiased")) -> pd.DataFrame:
    """Two stages, the last in two dtypes, with plain numbers: error eps / 8 + 2^-9 under a filter, 2^-8 else."""
    rows = []
    stages = ("initial", "trained")
    for (stage, dtype), name in itertools.product(
        (("initial", "bf16"), ("trained", "bf16"), ("trained", "fp16")), variants
    ):
        thresholds = (2.0**-4, 2.0**-12, 2.0**-15, 2.0**-20) if ALL[name].filtered else (math.nan,)
        for eps in thresholds:
            cell = {"case": "captured", "stage": stage, "variant": name, "dtype": dtype, "n": 8, "v": 64, "d": 4}
            cell |= {"eps": eps, "seed": 0}
            error = 2.0**-8 if math.isnan(eps) else eps / 8 + 2.0**-9
            values = {("time", "seconds"): 1.0 if name == "baseline" else 2.0 - (0 if math.isnan(eps) else eps)}
            values |= {("loss", "rel"): 2.0**-20, ("loss", "growth"): 1.25}
            values |= {("filter", "dropped_mass"): 0.25, ("filter", "hits"): 1 / error}
            for quantity in ("dE", "dC"):
                values |= {(quantity, "rel"): error, (quantity, "floor"): 2.0**-9, (quantity, "empty_rows"): 0.5}
                values |= {(quantity, f"row_{q}"): error * (i + 1) for i, q in enumerate(("q50", "q90", "q99", "max"))}
                values |= {(quantity, "growth"): 1.25, (quantity, "bias"): -0.5, (quantity, "bias_z"): -3.0}
                values |= {(quantity, "ulp_q50"): 0.25, (quantity, "ulp_q99"): 2.0, (quantity, "ulp_share:0.5"): 0.75}
                values |= {(quantity, "ulp_share:2"): 0.25, (quantity, "rel:targets=0"): 3 * error}
                if (stage, dtype) == ("trained", "bf16"):
                    values |= {(quantity, "budget_relative"): error, (quantity, "budget_bound"): 8 * error}
                    values |= {(quantity, f"budget_share:{stage_.value}"): 1 / len(STAGES) for stage_ in STAGES}
            rows += [cell | {"quantity": q, "metric": m, "value": v} for (q, m), v in values.items()]
    for stage, rank in itertools.product(stages, (1, 2, 4, 64)):
        cell = {"case": "captured", "stage": stage, "variant": "", "dtype": "bf16", "n": 8, "v": 64, "d": 4, "seed": 0}
        rows.append(cell | {"eps": math.nan, "quantity": "softmax", "metric": f"rank:{rank}", "value": 0.5 / rank})
    origin = {"commit": "0123abc", "versions": "torch", "device": "a <device>", "command": "cce-precision report"}
    return pd.DataFrame(rows).assign(**origin)[list(sweep.COLUMNS)]


# -- the answer --------------------------------------------------------------------------------------------------------


def test_the_cheapest_within_a_tolerance_is_found() -> None:
    found = report.options(made_up_table(), VIEW)
    seconds = [o.seconds for o in found]
    assert seconds == sorted(seconds)
    loose = report.cheapest(found, 2.0**-8)
    assert loose is not None and loose.variant == "baseline" and loose.relative_time == 1.0
    tight = report.cheapest(found, 2.0**-8.5)
    fit = [o for o in found if o.error <= 2.0**-8.5]
    alike = [o for o in fit if o.seconds <= report.ALIKE * min(o.seconds for o in fit)]
    assert tight is not None and ALL[tight.variant].filtered and tight.error == min(o.error for o in alike)
    assert report.cheapest(found, 0.0) is None


def test_an_error_that_is_not_a_number_is_within_no_tolerance() -> None:
    table = made_up_table()
    table.loc[(table["quantity"] == "dE") & (table["metric"] == "rel"), "value"] = math.nan
    assert report.cheapest(report.options(table, VIEW), 1.0) is None


def test_no_further_off_than_the_baseline_holds_in_each_of_the_three() -> None:
    table = made_up_table()
    of = (table["variant"] == "baseline") & (table["quantity"] == "dC") & (table["metric"] == "rel")
    table.loc[of, "value"] = 2.0**-30  # now nothing else is as exact in dC
    found = report.options(table, VIEW)
    base = next(o for o in found if o.variant == "baseline")
    assert report.as_exact_as(found, base) is base


def test_the_answer_is_about_the_trained_stage_in_bf16() -> None:
    assert report.main_view(made_up_table()) == VIEW
    assert len(report.views(made_up_table())) == 3


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0022, "2.2e-3"), (0.25, "0.25"), (1234.5, "1,234"), (0.0, "0"), (math.nan, "-"), (math.inf, "inf"), (17, "17")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert report.number(value) == text


# -- figures -----------------------------------------------------------------------------------------------------------


def test_each_view_has_all_figures_and_each_figure_two_renderings(tmp_path: Path) -> None:
    made = figures.figures(made_up_table(), VIEW)
    assert [f.name for f in made] == ["error", "rows", "budget", "bounds", "ulps", "kept", "dropped"]
    for figure in [*made, figures.stage_figure(made_up_table(), "captured")]:
        spec = drawing.plotly_figure(figure)
        json.dumps(spec, allow_nan=False)
        names = {s.name for panel in figure.panels for s in panel.series}
        assert names <= {trace["name"] for trace in spec["data"]}
    drawing.draw(made[0], tmp_path / "a.svg", tmp_path / "a.png")
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_threshold_figure_shows_the_floor_and_the_baseline() -> None:
    error = figures.figures(made_up_table(), VIEW)[0]
    for panel in error.panels:
        levels = {level.name: level.y for level in panel.levels}
        assert levels[figures.FLOOR] == 2.0**-9 and levels["baseline"] == 2.0**-8
        assert {s.name for s in panel.series} == {"cce", "cce_unbiased"}
        assert panel.log_x and panel.log_y


def test_a_figure_without_data_is_left_out() -> None:
    table = made_up_table(("baseline",))
    assert [f.name for f in figures.figures(table, VIEW)] == ["error", "rows", "budget", "bounds", "ulps", "kept"]
    without = table[~table["metric"].str.startswith(("budget", "ulp"))]
    assert [f.name for f in figures.figures(without, VIEW)] == ["error", "rows", "kept"]


def test_bars_are_stacked_to_the_whole(tmp_path: Path) -> None:
    made = {f.name: f for f in figures.figures(made_up_table(), VIEW)}
    for name, segments in (("budget", len(STAGES)), ("ulps", 2)):
        for panel in made[name].panels:
            assert panel.stacked and len(panel.series) == segments and len(panel.categories) == 4
            assert all(sum(float(s.x[i]) for s in panel.series) == pytest.approx(1, abs=2.0**-50) for i in range(4))
        spec = drawing.plotly_figure(made[name])
        bars = [trace for trace in spec["data"] if trace["type"] == "bar"]
        assert len(bars) == 2 * segments and spec["wide"]["barmode"] == "stack" and spec["wide"]["showlegend"]
        drawing.draw(made[name], tmp_path / f"{name}.svg")
        text = (tmp_path / f"{name}.svg").read_text()
        assert all(s.name in text for s in made[name].panels[0].series) and "cce_exact" in text


def test_a_bound_stands_beside_its_error() -> None:
    bounds = next(f for f in figures.figures(made_up_table(), VIEW) if f.name == "bounds")
    assert all(float(s.x[1]) == 8 * float(s.x[0]) for panel in bounds.panels for s in panel.series)


@pytest.mark.parametrize("bad", [math.nan, pytest.param(math.inf, marks=pytest.mark.slow)])
def test_numbers_that_are_none_are_left_out_of_the_figures(bad: float, tmp_path: Path) -> None:
    table = made_up_table()
    table.loc[table["variant"].isin(["cce", "baseline"]) & table["quantity"].isin(["dE", "dC"]), "value"] = bad
    for figure in figures.figures(table, VIEW):
        json.dumps(drawing.plotly_figure(figure), allow_nan=False)
        drawing.draw(figure, tmp_path / "a.png")


def test_every_variant_has_a_mark_of_its_own() -> None:
    marks = [figures.mark(name) for name in ALL]
    assert len(set(marks)) == len(ALL) == len({m.colour for m in marks})


def test_lines_and_names_are_as_dark_as_they_have_to_be() -> None:
    assert figures.contrast("#000000") == 21 and figures.contrast("#ffffff") == 1
    for name in (*figures.MARKS, "a variant of tomorrow"):
        assert figures.contrast(figures.text_colour(name)) >= 4.5 and figures.contrast(figures.mark(name).colour) >= 3


def test_names_without_a_mark_get_one_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "MARKS", dict(figures.MARKS))
    names = [f"peer {i}" for i in range(3 * len(figures.OTHERS))]
    figures.give_marks([*names, "cce"])
    assert len({figures.mark(name) for name in names}) == len(names)
    assert all(figures.contrast(figures.mark(name).colour) >= 3 for name in names)
    assert figures.mark("cce") not in {figures.mark(name) for name in names}


def test_the_default_threshold_of_each_dtype_is_chosen() -> None:
    chosen = figures.at_default(made_up_table())
    by_dtype = chosen.dropna(subset=["eps"]).groupby("dtype")["eps"].unique()
    assert {dtype: list(eps) for dtype, eps in by_dtype.items()} == {"bf16": [2.0**-12], "fp16": [2.0**-15]}


# -- the page ----------------------------------------------------------------------------------------------------------


class Loads(HTMLParser):
    """What a page would fetch: addresses in src, href, srcset and the like."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = ("src", "href", "srcset", "action", "data", "poster")
        self.found += [value or "" for name, value in attrs if name in names]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    failure = sweep.Failure(sweep.Cell("captured", "trained", "bf16", "cce_split", None, 0), "RuntimeError: <no>")
    return report.build(made_up_table(), tmp_path_factory.mktemp("page"), [failure], ["a note"])


def test_the_page_fetches_nothing(page: Path) -> None:
    loads = Loads()
    loads.feed(page.read_text())
    assert loads.found and all(address.startswith("data:") for address in loads.found)
    assert "url(http" not in (Path(report.__file__).parent / "templates" / "page.css").read_text()
    assert "default-src 'none'" in page.read_text()


def test_the_page_says_the_answer_first_and_all_the_rest(page: Path) -> None:
    text = page.read_text().split('<script type="application/json"')[0]
    order = [
        "The cheapest that is no further off",
        "The cheapest variant within a tolerance",
        "Error against threshold",
        "Error of single rows",
        "Where the error comes from",
        "Error and its rigorous bound",
        "Errors in units in the last place",
        "Error against kept entries",
        "What the filter dropped",
        "How fast the softmax falls",
        "Effective bits, units in the last place, bias",
        "Rows of dC by how often the word is a target",
        "Rigorous bounds",
        "Method",
        "Limits",
        "How to reproduce",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    assert "Compared with the earlier table" not in text
    for part in ("a note", "captured trained bf16 cce_split: RuntimeError: &lt;no&gt;", "a &lt;device&gt;", "0123abc"):
        assert part in text
    assert text.index("RuntimeError") < places[0]


def test_the_figures_lie_beside_the_page(page: Path) -> None:
    names = {p.name for p in (page.parent / "figures").iterdir()}
    for stem in ("error-captured-trained-bf16", "error-captured-trained-fp16", "rows-captured-trained-bf16"):
        assert {f"{stem}.png", f"{stem}.svg"} <= names


def test_a_table_without_a_variant_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no measured variant"):
        report.build(made_up_table(()), tmp_path)


# -- a comparison ------------------------------------------------------------------------------------------------------


def with_error(factor: float, variant: str = "cce_exact", quantity: str = "dE") -> pd.DataFrame:
    table = made_up_table()
    of = (table["variant"] == variant) & (table["quantity"] == quantity) & (table["metric"] == "rel")
    table.loc[of & (table["stage"] == "trained") & (table["dtype"] == "bf16"), "value"] *= factor
    return table


@pytest.mark.parametrize(
    ("factor", "grown", "fallen"),
    [(1.0, 0, 0), (1.2, 0, 0), (1.3, 1, 0), (math.nan, 1, 0), (math.inf, 1, 0), (0.9, 0, 0), (0.7, 0, 1), (0.0, 0, 1)],
)
def test_an_error_beyond_the_recorded_factor_has_changed(factor: float, grown: int, fallen: int) -> None:
    """The made-up table allows 1.25."""
    changes = report_compare.changed(made_up_table(), with_error(factor))
    assert (sum(c.grown for c in changes), sum(c.fallen for c in changes)) == (grown, fallen)
    assert len(changes) == 3 * (2 + 2 * 4) * 3  # views, variants without and with thresholds, quantities
    assert not (grown or fallen) or (changes[0].cell, changes[0].quantity) == ("captured trained bf16 cce_exact", "dE")


def test_an_error_where_there_was_none_has_grown() -> None:
    changes = report_compare.changed(with_error(0.0), made_up_table())
    assert changes[0].grown and changes[0].before == 0 and changes[0].factor == math.inf


@pytest.mark.parametrize(("factor", "grown"), [(1.0, False), (2.0, True), (0.5, False)])
def test_what_changed_is_said(factor: float, grown: bool, capsys: pytest.CaptureFixture[str]) -> None:
    changes = report_compare.changed(made_up_table(), with_error(factor))
    assert report_compare.said(changes, Console(width=160)) == grown
    said = capsys.readouterr().out
    assert "errors in both tables: 90" in said and ("captured trained bf16 cce_exact" in said) == (factor != 1)


def test_errors_that_were_left_out_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """A variant that is no longer measured cannot have grown, and is not passed over in silence."""
    before, after = made_up_table(), made_up_table()
    after = after[after["variant"] != "cce_exact"]
    missing = report_compare.unmeasured(before, after)
    errors = before[(before["metric"] == "rel") & (before["variant"] == "cce_exact")]
    assert missing == len(errors) > 0 == report_compare.unmeasured(before, before)
    report_compare.said(report_compare.changed(before, after), Console(width=160), missing)
    assert f"not measured now: {missing}" in capsys.readouterr().out


def test_tables_without_a_common_error_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Of other tokens, say: a gate that compares nothing must not pass."""
    assert report_compare.said(report_compare.changed(made_up_table().assign(n=9), made_up_table()), Console(width=160))
    assert "nothing is compared" in capsys.readouterr().out
    assert not report_compare.said(None, Console(quiet=True))


def test_the_comparison_decides_the_exit_code_and_stands_on_the_page(tmp_path: Path) -> None:
    small = lambda table: table[(table["stage"] == "trained") & (table["dtype"] == "bf16")]  # noqa: E731
    file = tmp_path / "old.parquet"
    small(made_up_table()).to_parquet(file)
    small(with_error(2.0)).to_parquet(tmp_path / "results.parquet")
    assert report.redraw(tmp_path, Console(quiet=True), report.load(file)) == 1
    text = (tmp_path / "index.html").read_text()
    assert text.index("Compared with the earlier table") < text.index("grown</td><td>captured trained bf16 cce_exact")


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "old.parquet"
    with pytest.raises(ValueError, match="does not exist"):
        report.load(file)
    file.write_text("no table")
    with pytest.raises(ValueError, match="is no table"):
        report.load(file)
    pd.DataFrame({"a": [1]}).to_parquet(file)
    with pytest.raises(ValueError, match="has no columns"):
        report.load(file)
    table = made_up_table()
    table[table["metric"] != "growth"].to_parquet(file)
    with pytest.raises(ValueError, match="earlier version"):
        report.load(file)


# -- the README --------------------------------------------------------------------------------------------------------


def test_the_readme_says_what_its_table_says() -> None:
    text = (ROOT / "README.md").read_text()
    block = text[text.index(report.BEGIN) : text.index(report.END) + len(report.END)]
    assert block == report.readme_block(pd.read_parquet(ROOT / "reports" / "readme" / "results.parquet"))


def test_the_readme_links_to_what_there_is() -> None:
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#\s]+)\)", text):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_readme_is_rewritten_between_its_markers(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nstale\n{report.END}\nafter\n")
    report.update_readme(readme, made_up_table())
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale" not in text and "`cce_exact`" in text
    report.update_readme(readme, made_up_table())
    assert readme.read_text() == text
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="markers"):
        report.update_readme(readme, made_up_table())
