"""Which causal language models of transformers `cce_patch` works for: every class, measured.

    cce-precision census --out reports/transformers

Each class of transformers' causal-LM mapping is built from a tiny random configuration and run in fp32 with labels,
unpatched and patched: the loss and the gradient of every parameter are compared, no operation may make a tensor of
vocabulary width, and without labels the logits must be the same bits. The results stand in models.csv, a line as soon
as it is known, so that a run that was stopped goes on where it was; README.md is drawn from it. Lines of several
releases of transformers live side by side.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cce_precision.analysis.census_configs import VOCABULARY, build, inputs, model_types
from cce_precision.huggingface import cce_counts, cce_patch, uncce_patch
from cce_precision.huggingface import head as heads

__all__ = ["Row", "check", "main", "page", "run"]

# What a patched model may differ by from the unpatched one: both round in fp32, in another order. Each as a multiple of
# the unit round-off: the loss's of the largest logit, the gradients' of the norm of the whole gradient.
UNIT = 2.0**-24
LOSS_ALLOWED = 4 * UNIT
GRADIENT_ALLOWED = 64 * UNIT


@dataclass(frozen=True)
class Row:
    """One class under one release."""

    transformers: str
    model_type: str
    model: str = ""
    result: str = ""  # passed, refused, unfused, wrong, not built
    why: str = ""
    loss_error: float = float("nan")  # |difference| / largest |logit|
    gradient_error: float = float("nan")  # norm of the difference / norm of the gradient
    head: str = ""  # tied, bias, softcap, scale

    @property
    def built(self) -> bool:
        return self.result != "not built"


class Widths(TorchDispatchMode):
    """Records the operations that make a tensor of vocabulary width which has no parameter's shape."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.known = {tuple(p.shape) for p in model.parameters()}
        self.known |= {tuple(reversed(shape)) for shape in self.known}
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            wide = isinstance(x, Tensor) and VOCABULARY in x.shape and x.numel() > VOCABULARY
            if wide and tuple(x.shape) not in self.known:
                self.found.append(f"{func} {tuple(x.shape)}")
        return out


@dataclass
class Step:
    """A loss, its gradients and the logits of a model."""

    loss: float
    gradients: dict[str, Tensor]
    logits: Tensor | None = None


def step(model: nn.Module, given: dict[str, Any]) -> Step:
    """One forward and backward from the seed 0 (some models draw)."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    out = model(**given)
    loss = out.loss if hasattr(out, "loss") else out[0]
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Step(float(loss.detach()), gradients)


def logits_of(model: nn.Module, given: dict[str, Any]) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        out = model(**{name: value for name, value in given.items() if name != "labels"})
    return out.logits if hasattr(out, "logits") else out[0]


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Norm of the difference of two gradients over the norm of the second; infinite where one has none."""
    if ours.keys() != theirs.keys():
        return float("inf")
    square = sum(float((ours[name] - theirs[name]).double().square().sum()) for name in theirs)
    norm = sum(float(theirs[name].double().square().sum()) for name in theirs)
    return (square / norm) ** 0.5 if norm else float("inf")


class LossInFp64(TorchFunctionMode):
    """The losses inside are those of the same logits, computed and differentiated in fp64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.cross_entropy, F.nll_loss, F.log_softmax):
            args = (args[0].double(), *args[1:])
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def calls_of_the_loss(seen: list[dict[str, Any]]) -> Iterator[None]:
    """Notes the arguments of every call of `linear_cross_entropy` that a patched model makes."""
    signature = inspect.signature(heads.linear_cross_entropy)
    original = heads.linear_cross_entropy

    def noted(*args: Any, **kwargs: Any) -> Any:
        seen.append(dict(signature.bind(*args, **kwargs).arguments))
        return original(*args, **kwargs)

    with mock.patch.object(heads, "linear_cross_entropy", noted):
        yield


def check(model_type: str, **options: Any) -> Row:
    """The row of a model type; `options` are those of `cce_patch`. Never raises but for an interrupt."""
    import transformers

    row = Row(transformers.__version__, model_type)
    try:
        model = build(model_type)
        row = dataclasses.replace(row, model=type(model).__name__)
        given = inputs(model_type, model)
        theirs, again = step(model, given), step(model, given)
        theirs.logits = logits_of(model, given)
    except Exception as error:
        return dataclasses.replace(row, result="not built", why=_said(error))
    if theirs.loss != again.loss:
        return dataclasses.replace(row, result="not built", why="two runs of the unpatched model differ")
    try:
        cce_patch(model, **options)
    except TypeError as error:
        return dataclasses.replace(row, result="refused", why=_said(error))
    try:
        return compared(row, model, given, theirs)
    except Exception as error:
        return dataclasses.replace(row, result="wrong", why=_said(error))
    finally:
        uncce_patch(model)


def compared(row: Row, model: Any, given: dict[str, Any], theirs: Step) -> Row:
    """The row of a patched model beside what it gave unpatched."""
    calls: list[dict[str, Any]] = []
    with warnings.catch_warnings(), Widths(model) as widths, calls_of_the_loss(calls):
        warnings.simplefilter("ignore")
        ours = step(model, given)
    counts = cce_counts(model)
    assert theirs.logits is not None
    largest = max(float(theirs.logits.abs().max()), abs(theirs.loss))
    loss_error = abs(ours.loss - theirs.loss) / largest
    gradient_error = difference(ours.gradients, theirs.gradients)
    row = dataclasses.replace(row, loss_error=loss_error, gradient_error=gradient_error, head=_head(model, calls))
    if not counts.fused or counts.materialised:
        return dataclasses.replace(row, result="unfused", why=", ".join(counts.operations) or "the loss is its own")
    if widths.found:
        return dataclasses.replace(row, result="unfused", why=f"made {widths.found[0]}")
    wrong = []
    if not torch.equal(logits_of(model, given), theirs.logits):
        wrong.append("other logits without labels")
    if not loss_error <= LOSS_ALLOWED:
        wrong.append(f"loss off by {loss_error:.1e} of the largest logit")
    said = ""
    if not gradient_error <= GRADIENT_ALLOWED:
        # Which of the two is it? A large difference may be the cancellation p - 1 in the unpatched gradient.
        with LossInFp64():
            truth = step(uncce_patch(model), given).gradients
        error, theirs_error = (difference(x, truth) for x in (ours.gradients, theirs.gradients))
        said = f"gradient off by {error:.1e} from that of the loss in fp64, the unpatched one by {theirs_error:.1e}"
        if not error <= GRADIENT_ALLOWED:
            wrong.append(said)
    return dataclasses.replace(row, result="wrong" if wrong else "passed", why="; ".join(wrong) or said)


def _head(model: Any, calls: list[dict[str, Any]]) -> str:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    call = calls[-1] if calls else {}
    found = {
        "tied": head.weight is getattr(embedding, "weight", None),
        "bias": call.get("bias") is not None,
        "softcap": call.get("softcap") is not None,
        "scale": call.get("temperature", 1.0) != 1.0,
    }
    return " ".join(name for name, present in found.items() if present)


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200]


# -- the run and its page ----------------------------------------------------------------------------------------------


def read(path: Path) -> list[Row]:
    """The rows of models.csv; none where there is no such file."""
    if not path.exists():
        return []
    rows = []
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            values: dict[str, Any] = dict(line)
            rows.append(Row(**values | {name: float(line[name]) for name in ("loss_error", "gradient_error")}))
    return rows


def write(path: Path, rows: list[Row]) -> None:
    names = [field.name for field in dataclasses.fields(Row)]
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, names, lineterminator="\n")
        table.writeheader()
        for row in sorted(rows, key=lambda row: ([-int(x) for x in row.transformers.split(".")[:2]], row.model_type)):
            table.writerow({k: f"{v:.1e}" if isinstance(v, float) else v for k, v in dataclasses.asdict(row).items()})


def run(out: Path, only: list[str] | None = None, fresh: bool = False, console: Any = None) -> list[Row]:
    """Checks what `out` does not hold yet under the installed transformers (all of it with `fresh`); the rows of all
    releases. Raises ValueError for an unknown model type."""
    import transformers
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    transformers.logging.set_verbosity_error()
    known = model_types()
    unknown = sorted(set(only or ()) - set(known))
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no model type with a causal language model in this transformers")
    out.mkdir(parents=True, exist_ok=True)
    path = out / "models.csv"
    version = transformers.__version__
    chosen = [name for name in known if not only or name in only]
    rows = {(row.transformers, row.model_type): row for row in read(path)}
    if fresh:
        rows = {key: row for key, row in rows.items() if key[0] != version or key[1] not in chosen}
    todo = [name for name in chosen if (version, name) not in rows]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = console or Console()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"transformers {version}", total=len(todo))
        for name in todo:
            row = check(name)
            rows[version, name] = row
            write(path, list(rows.values()))
            if row.result != "passed":
                progress.print(f"{name}: {row.result}, {row.why}")
            progress.advance(task)
    (out / "README.md").write_text(page(read(path)))  # in the order of the table
    return list(rows.values())


def page(rows: list[Row]) -> str:
    """README.md of the rows: a table of the releases, the exceptions with their reasons, what passes."""
    releases = sorted(
        {row.transformers for row in rows}, key=lambda v: [int(x) for x in v.split(".")[:2]], reverse=True
    )
    lines = [
        "# Causal language models of transformers under `cce_patch`",
        "",
        "Every class of the causal-LM mapping, from a tiny random configuration, in fp32: loss and gradients beside",
        f"the unpatched model (allowed: {LOSS_ALLOWED / UNIT:.0f} unit round-offs of the largest logit for the loss, "
        f"{GRADIENT_ALLOWED / UNIT:.0f} of its",
        "norm for the gradient; where it is more, the patched one must be that near to the gradient of a loss in fp64",
        "of the same logits), no tensor of vocabulary width, and without labels the same bits as ever. The numbers are",
        "in `models.csv`. Both files are written by this command; for another release of transformers, in a folder",
        "of its own (pip install --no-deps --target), by `python -m cce_precision.analysis.census` with that in",
        "PYTHONPATH.",
        "",
        "    cce-precision census --out reports/transformers",
        "",
        "| transformers | classes | built | passed | of those built | largest error: loss | gradient |",
        "|---|---|---|---|---|---|---|",
    ]
    for release in releases:
        own = [row for row in rows if row.transformers == release]
        built = [row for row in own if row.built]
        passed = [row for row in built if row.result == "passed"]
        worst = [f"{max((getattr(r, n) for r in passed), default=0):.1e}" for n in ("loss_error", "gradient_error")]
        share = f"{100 * len(passed) / max(len(built), 1):.1f} %"
        lines.append(f"| {release} | {len(own)} | {len(built)} | {len(passed)} | {share} | {' | '.join(worst)} |")
    for result, heading in (
        ("refused", "Refused when patched"),
        ("unfused", "Right, but with logits"),
        ("wrong", "Wrong"),
        ("not built", "Not built"),
    ):
        some = [row for row in rows if row.result == result]
        if some:
            lines += ["", f"## {heading}", "", "| transformers | model type | class | why |", "|---|---|---|---|"]
            order = sorted(some, key=lambda row: (releases.index(row.transformers), row.model_type))
            cell = lambda text: text.replace("|", "\\|")  # noqa: E731
            lines += [f"| {r.transformers} | {r.model_type} | {r.model} | {cell(r.why)} |" for r in order]
    better = [row for row in rows if row.result == "passed" and row.why]
    if better:
        lines += ["", "## Passed, and nearer to the gradient of a loss in fp64 than the unpatched model", ""]
        lines += [f"- {r.model} ({r.transformers}): {r.why}" for r in better]
    lines += ["", "## Passed", ""]
    newest = [row for row in rows if row.transformers == releases[0] and row.result == "passed"]
    for kind in ("softcap", "scale", "bias", "tied"):
        having = sorted({row.model for row in newest if kind in row.head.split()})
        lines += [f"With {kind} ({len(having)}): {', '.join(having)}.", ""]
    names = sorted({row.model for row in newest})
    lines += [f"All {len(names)} classes ({len(newest)} model types) in {releases[0]}: {', '.join(names)}.", ""]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """The command without `cli`, for a transformers in another folder."""
    parser = argparse.ArgumentParser(prog="python -m cce_precision.analysis.census", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("reports/transformers"))
    parser.add_argument("--only", default="", help="model types, separated by commas")
    parser.add_argument("--fresh", action="store_true", help="check again what the folder holds")
    options = parser.parse_args(arguments)
    run(options.out, [name for name in options.only.split(",") if name], options.fresh)


if __name__ == "__main__":
    main()
