"""`cce-precision capture --train`: trains a model on real text, and measures every variant on its head on the way.

A stage (see `pretrain`) is measured in the run that takes it, so that a head too large for a file is measured too:
what its softmax is like (`heads`), and each variant's loss, dE and dC on a sample of rows against fp64 (`sampled`), the
same rows for all, with the time of the call. A folder holds one run: checkpoint.pt until it is finished, rows.jsonl, a
line a call, results.parquet with a number a row in the columns of `sweep`, card.json, and the captured heads where the
preset saves them. The same command resumes there.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from cce_precision.analysis import pretrain, sampled, sweep
from cce_precision.analysis.bench import provenance
from cce_precision.analysis.choose import SEEDS, Run, Timer
from cce_precision.analysis.heads import HeadStatistics, statistics_table
from cce_precision.analysis.pretrain import MOMENTS, Preset, Stage
from cce_precision.analysis.train import claim
from cce_precision.analysis.train_command import STOPPED
from cce_precision.analysis.train_text import SHIPPED
from cce_precision.problem import Problem
from cce_precision.variants import DEFAULT, get

__all__ = ["Recipe", "clear", "load", "rows_of_stage", "run"]

CALLS = 3  # of a variant, as long as they take less than ...
PATIENCE = 10_000  # ... milliseconds together; its time is that of the fastest
SIDES = ("dE", "dC")
FILES = ("recipe.json", "rows.jsonl", "card.json", "results.parquet", "index.html", "checkpoint.pt")

Row = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """What is trained and measured. Raises ValueError for an unknown preset, budgets and files that cannot be."""

    preset: str = "shipped"
    device: str = "cpu"  # or "cuda"
    text: tuple[Path, ...] = (SHIPPED,)
    heldout: Path | None = None  # None: the last twentieth of the text
    tokenizer: Path | None = None  # None: trained on the text
    minutes: float | None = None
    steps: int | None = None
    seed: int = 0
    save: str = ""  # none, compact or full; "": as the preset says
    impls: tuple[str, ...] = ("baseline", DEFAULT)
    rows: int = 256  # of each gradient

    def __post_init__(self) -> None:
        if self.preset not in pretrain.PRESETS:
            raise ValueError(f"preset is {self.preset!r}, known are {', '.join(pretrain.PRESETS)}")
        if (self.minutes is None) == (self.steps is None):
            raise ValueError("give minutes or steps of training, not both")
        if not (self.minutes or self.steps or 0) > 0:
            raise ValueError(f"minutes and steps must be positive, got {self.minutes or self.steps}")
        if self.steps is not None and self.steps < (least := round(1 / MOMENTS["early"])):
            raise ValueError(f"steps is {self.steps}, at least {least} are needed to take every stage")
        for path in self.files():
            if not path.is_file():
                raise ValueError(f"{path} does not exist")

    def files(self) -> list[Path]:
        return [*self.text, *(path for path in (self.heldout, self.tokenizer) if path)]

    def shape(self) -> Preset:
        """The preset on this device."""
        presets = pretrain.ON_CPU if self.device == "cpu" else pretrain.PRESETS
        return replace(presets[self.preset], save=self.save) if self.save else presets[self.preset]

    def about(self) -> Row:
        """All that the numbers depend on, in plain values; files by their content."""
        content = [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in self.files()]
        plain = asdict(self) | {"shape": asdict(self.shape()), "files": content, "torch": torch.__version__}
        return {k: v for k, v in plain.items() if k not in ("text", "heldout", "tokenizer")} | {
            "impls": list(self.impls)
        }


# -- one stage ---------------------------------------------------------------------------------------------------------


def problem_of(stage: Stage) -> Problem:
    """The captured head as a call with the mean loss, in the dtype that it was captured in."""
    head = stage.capture
    return Problem(head.e, head.c, torch.where(head.targets == -100, -1, head.targets), head.bias, None, head.softcap)


def _numbers(found: sampled.Sampled) -> list[tuple[str, str, float]]:
    """(quantity, metric, value) of one call; the metrics of `metrics.rows`, with the interval of rel."""
    assert found.loss is not None
    numbers = [("loss", "rel", found.loss.rel)]
    for side in SIDES:
        one: sampled.Measured = getattr(found, side)
        numbers += [(side, "rel", one.rel.value), (side, "rel_low", one.rel.low), (side, "rel_high", one.rel.high)]
        numbers += [(side, "floor", one.floor)]
        numbers += [(side, f"row_q{100 * level:.0f}", x.value) for level, x in one.quantiles.items()]
        numbers += [(side, f"rel:{name}", x.value) for name, (_, x) in one.strata.items()]
    return numbers


def rows_of_stage(
    problem: Problem, impls: Sequence[str], held: Sequence[Row], *, head: str, rows: int, seed: int
) -> Any:
    """Yields a row for each variant and draw that `held` lacks: head, impl, seed and its numbers, or why it failed."""
    there = {(row["impl"], row["seed"]) for row in held if row["head"] == head}
    todo = [(name, seed + k) for name in impls for k in range(SEEDS if get(name).random else 1)]
    todo = [one for one in todo if one not in there]
    if not todo:
        return
    timer = Timer(problem.e.device)
    _, *guide = Run(DEFAULT)(problem)
    exact = sampled.ExactRows(problem, (guide[0], guide[1]), rows=rows, columns=rows, seed=seed)
    for name, draw in todo:
        row: Row = {"head": head, "impl": name, "seed": draw}
        results: list[Any] = []
        calls: list[float] = []
        try:
            while len(calls) < CALLS and sum(calls) < PATIENCE:
                calls.append(timer(lambda: results.append(Run(name)(problem, draw))))  # noqa: B023
        except (ValueError, RuntimeError, NotImplementedError) as error:  # what a variant cannot do, in its own words
            yield row | {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
            continue
        loss, d_e, d_c = results[0]
        numbers = [*_numbers(exact.compare(d_e, d_c, loss)), ("time", "seconds", min(calls) / 1e3)]
        yield row | {"numbers": numbers}


# -- the run -----------------------------------------------------------------------------------------------------------


def load(out: Path) -> list[Row]:
    """The finished calls of a folder; a line that was cut off is none."""
    path = out / "rows.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def clear(out: Path) -> None:
    """Removes the run of a folder, and nothing else."""
    for path in (*(out / name for name in FILES), *(out / f"captured-{name}.safetensors" for name in MOMENTS)):
        path.unlink(missing_ok=True)


def run(recipe: Recipe, out: Path, console: Console) -> int:
    """Trains, measures and draws what the folder lacks; the command's exit code: 0, 1 where a variant failed, or 130
    where it was stopped and can go on.

    Raises ValueError where the folder holds another run, where its disk is too full, and as `pretrain.pretrain`.
    """
    out.mkdir(parents=True, exist_ok=True)
    claim(recipe.about(), out)
    card, checkpoint = out / "card.json", out / "checkpoint.pt"
    if not card.exists():
        try:
            _train(recipe, out, console)
        except KeyboardInterrupt:
            return STOPPED
        finally:
            if not (card.exists() or checkpoint.exists()):  # there is nothing to go on with
                clear(out)
    checkpoint.unlink(missing_ok=True)
    table = write_table(recipe, out)
    return show(table, json.loads(card.read_text()), out, console)


def _train(recipe: Recipe, out: Path, console: Console) -> None:
    """Trains and measures; card.json is the last thing that it writes."""

    def on_stage(name: str, stage: Stage) -> None:
        started = time.perf_counter()
        problem = problem_of(stage)
        head = sweep.digest(problem)[:16]
        done = 0
        options: Row = {"head": head, "rows": recipe.rows, "seed": recipe.seed}
        with (out / "rows.jsonl").open("a") as file:
            for row in rows_of_stage(problem, recipe.impls, load(out), **options):
                file.write(json.dumps({"stage": name, **row}) + "\n")
                file.flush()
                done += 1
                if "failed" in row:
                    console.print(f"{name}: {row['impl']} failed: {row['failed']}", markup=False)
        s = stage.statistics
        said = f"{name}: {stage.tokens_seen:,} tokens seen, loss {s.loss:.3f}, entropy {s.entropy:.2f}"
        console.print(f"{said} nats; {done} calls measured in {time.perf_counter() - started:.0f} s", highlight=False)

    whole = [json.dumps(row) + "\n" for row in load(out)]
    (out / "rows.jsonl").write_text("".join(whole))  # without a line that was cut off
    trained, card = pretrain.pretrain(
        recipe.text, recipe.heldout, preset=recipe.shape(), tokenizer=recipe.tokenizer, minutes=recipe.minutes,
        steps=recipe.steps, device=recipe.device, seed=recipe.seed, checkpoint=out / "checkpoint.pt", console=console,
        on_stage=on_stage,
    )  # fmt: skip
    heads = {name: sweep.digest(problem_of(stage))[:16] for name, stage in trained.stages.items()}
    if recipe.text == (SHIPPED,):
        card["text"] = f"{SHIPPED.name}, which comes with the library"
    pretrain.write(trained, card | {"heads": heads, **provenance()}, out)


def write_table(recipe: Recipe, out: Path) -> Any:
    """results.parquet from rows.jsonl and card.json: a pandas.DataFrame with the columns of `sweep`."""
    import pandas as pd

    card = json.loads((out / "card.json").read_text())
    shape = recipe.shape()
    common = {"case": recipe.preset, "dtype": "bf16", "n": shape.captured, "v": shape.vocabulary, "d": shape.head_width}
    found = []
    for name, stage in card["stages"].items():
        plain = {k: v for k, v in stage.items() if isinstance(v, (int, float))}
        for quantity, numbers in (("training", plain), ("softmax", stage["statistics"])):
            for metric, value in numbers.items():
                for part, number in value.items() if isinstance(value, dict) else [("", value)]:
                    row = {"stage": name, "variant": "", "eps": math.nan, "seed": 0, "quantity": quantity}
                    found.append(row | {"metric": f"{metric}:{part}" if part else metric, "value": number})
    for call in load(out):
        if card["heads"][call["stage"]] != call["head"]:  # of a stage that was taken again
            continue
        variant = get(call["impl"])
        eps = variant.filter_e.threshold(torch.bfloat16) if variant.filtered else math.nan
        row = {"stage": call["stage"], "variant": variant.name, "eps": eps, "seed": call["seed"]}
        found += [row | {"quantity": q, "metric": m, "value": x} for q, m, x in call.get("numbers", ())]
    where = {"commit": card["commit"], "versions": card["versions"], "device": card["training"]["device"]}
    table = pd.DataFrame(found).assign(**common, **where, command=card["command"])[list(sweep.COLUMNS)]
    table = table.astype({"eps": float, "value": float})
    draft = out / "results.parquet.tmp"
    table.to_parquet(draft, index=False)
    draft.replace(out / "results.parquet")
    return table


def means(table: Any, quantity: str, metric: str) -> Any:
    """A number by variant (rows) and stage (columns), the mean over draws; stages in the order of training."""
    some = table[(table["quantity"] == quantity) & (table["metric"] == metric) & (table["variant"] != "")]
    wide = some.pivot_table(index="variant", columns="stage", values="value", sort=False)
    return wide[[stage for stage in MOMENTS if stage in wide]]


def show(table: Any, card: Row, out: Path, console: Console) -> int:
    """The tables on the screen and the page; 1 where a variant failed, which the page names."""
    from importlib.util import find_spec

    statistics = {name: HeadStatistics(**stage["statistics"]) for name, stage in card["stages"].items()}
    console.print(statistics_table(statistics))
    found = {side: means(table, side, "rel") for side in SIDES}
    seconds = means(table, "time", "seconds")
    caption = (
        "Relative errors (Euclidean norm) of the gradients of the mean loss, from a sample of rows against fp64; "
        f"variants that sample: mean of {SEEDS} draws."
    )
    drawn = Table(caption=caption, caption_justify="left", box=box.SIMPLE)
    drawn.add_column("variant", no_wrap=True)
    for stage in found["dE"]:
        drawn.add_column(f"{stage}: dE, dC", justify="right", no_wrap=True)
    drawn.add_column("ms, trained", justify="right")
    for name in found["dE"].index:
        cells = [", ".join(f"{found[side].loc[name, stage]:.1e}" for side in SIDES) for stage in found["dE"]]
        drawn.add_row(name, *cells, f"{1e3 * seconds.loc[name].iloc[-1]:,.1f}")
    console.print(drawn)
    if find_spec("plotly"):
        from cce_precision.analysis import capture_page

        console.print(str(capture_page.build(out)))
    return 1 if any("failed" in row for row in load(out)) else 0
