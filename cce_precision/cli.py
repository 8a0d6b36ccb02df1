"""The command `cce-precision`. A command imports what it needs from `analysis` when it runs, so that `--help` is quick.

Errors of the caller (an unknown name, a bad value) leave with exit code 2 and one line that says what is allowed.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

try:
    import typer
    from rich import box
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as error:  # the core works without them, the command does not
    sys.exit(f"cce-precision: the command needs the package {error.name!r}: pip install 'cce-precision[report]'")

__all__ = ["app", "bad_option", "main", "names"]

# Which extra brings a package that a command may miss.
EXTRAS = {
    "typer": "report",
    "rich": "report",
    "pandas": "report",
    "pyarrow": "report",
    "plotly": "report",
    "matplotlib": "report",
    "safetensors": "report",
    "transformers": "transformers",
    "tokenizers": "transformers",
    "ray": "ray",
    "hypothesis": "dev",
    "mpmath": "dev",
    "flint": "dev",
    "triton": "dev",
}

app = typer.Typer(
    name="cce-precision",
    help="Cross-entropy of a large-vocabulary linear head without its logits, in variants whose error is known.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point of `cce-precision` and `python -m cce_precision`."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop keeps what is done, as Ctrl-C does
    try:
        app(prog_name="cce-precision")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        advice = f"pip install 'cce-precision[{EXTRAS[package]}]'"
        print(f"cce-precision: this command needs the package {package!r}: {advice}", file=sys.stderr)
        sys.exit(2)


def console() -> Console:
    """The screen; a fixed width wide enough for every table where the output is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 160)


@contextlib.contextmanager
def bad_option(option: str | None = None) -> Iterator[None]:
    """Turns a ValueError or TypeError about an option into the command's own error, with exit code 2."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(str(error), param_hint=None if option is None else f"'{option}'") from None


def names(text: str) -> list[str]:
    """The parts of a list that is separated by commas, without blanks."""
    return [part.strip() for part in text.split(",") if part.strip()]


@app.command()
def variants(as_json: bool = typer.Option(False, "--json", help="The records as JSON.")) -> None:
    """The table of the variants: what each filters, rounds and sums."""
    import dataclasses

    from cce_precision.variants import ALL

    if as_json:
        print(json.dumps([dataclasses.asdict(variant) for variant in ALL.values()], indent=2))
        return
    table = Table(box=box.SIMPLE, padding=(0, 1))
    for heading in ("name", "filter of dE", "filter of dC", "dZ operand", "sums"):
        table.add_column(heading, no_wrap=True)
    meaning = Table.grid(padding=(0, 2))
    for variant in ALL.values():
        filters = [f"{f.granularity.value} {f.kind.value}" if f else "-" for f in (variant.filter_e, variant.filter_c)]
        sums = ", ".join(dict.fromkeys((variant.accum_e.value, variant.accum_c.value)))
        also = f" (also {', '.join(variant.aliases)})" if variant.aliases else ""
        table.add_row(variant.name, *filters, variant.operand.value, sums)
        meaning.add_row(variant.name, variant.summary + also)
    console().print(table, meaning)


@app.command()
def memory(
    model: str = typer.Option("all", "--model", help="A model's name, or all."),
    gpus: int = typer.Option(16, min=1, help="Number of GPUs that share the weights and the batch."),
    gigabytes: float = typer.Option(80.0, min=1.0, help="Memory of one GPU in GiB."),
    tokens: int = typer.Option(65536, min=1, help="Tokens of the batch that the columns describe."),
    as_json: bool = typer.Option(False, "--json", help="The rows as JSON."),
) -> None:
    """Memory of logits, activations and weights by model, and how much larger a batch becomes (the paper's Figure
    1)."""
    from cce_precision.analysis import memory as figure

    with bad_option("--model"):
        rows = figure.rows(model, gpus=gpus, gigabytes=gigabytes, tokens=tokens)
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        console().print(figure.table(rows, gpus=gpus, gigabytes=gigabytes, tokens=tokens))


@app.command()
def report(
    data: list[Path] = typer.Option([], help="A captured head, FILE.safetensors; may be given several times."),
    variants: str = typer.Option("auto", help="Variants by name, separated by commas, or all."),
    eps: str = typer.Option("auto", help="Thresholds: 2^-12, 1e-3, or a range 2^-4..2^-24 in steps of 2^2."),
    dtype: str = typer.Option("auto", help="bf16, fp16, fp32, separated by commas; auto: bf16, and fp16 when trained."),
    case: str = typer.Option("auto", help="captured, init, trained, confident, ties, offset, separated by commas."),
    out: Path = typer.Option(Path("reports/latest"), help="Folder for results.parquet, the figures and index.html."),
    engine: str = typer.Option("local", help="local, or ray (spread over machines)."),
    workers: int = typer.Option(0, min=0, help="Cells at a time; 0: as many as the CPUs hold."),
    threads: int = typer.Option(1, min=1, help="Threads of a cell; the last bits of a result may depend on it."),
    tokens: int = typer.Option(512, min=0, help="Only so many tokens of each head, in runs of 128; 0: all."),
    seed: int = typer.Option(0, help="Seed of synthetic cases and of variants that sample."),
    page: bool = typer.Option(False, "--page-only", help="Measure nothing: draw the page from results.parquet."),
) -> None:
    """Error of every variant against its threshold on real heads: a table, figures, a page that says which to take."""
    from cce_precision.analysis import engines, sweep
    from cce_precision.analysis import report as reporting

    if page:
        with bad_option("--out"):
            reporting.redraw(out, console())
        return
    with bad_option("--engine/--workers"):
        chosen = engines.engine(engine, workers or None)
    with bad_option("--data/--variants/--eps/--dtype/--case"):
        plan, notes = reporting.plan(
            data=data,
            variants=None if variants == "auto" else names(variants),
            eps=None if eps == "auto" else sweep.parse_eps(eps),
            dtypes=None if dtype == "auto" else names(dtype),
            cases=None if case == "auto" else names(case),
            tokens=tokens or None,
            seed=seed,
            threads=threads,
        )
    command = shlex.join(["cce-precision", *sys.argv[1:]])
    raise typer.Exit(reporting.run(plan, out, chosen, command, console(), notes))


@app.command()
def bench(
    device: str = typer.Option("auto", help="cpu, cuda or auto."),
    shape: str = typer.Option(
        "auto", "--shape", "--shapes", help="Shapes: names, NAME@TOKENS or NxVxD, separated by commas."
    ),
    methods: str = typer.Option("auto", help="Methods by name (cce_exact@4096MB: with that workspace)."),
    dtype: str = typer.Option("auto", help="bf16, fp16, fp32, separated by commas."),
    case: str = typer.Option(
        "trained", help="The case that fills a shape: init, trained, ..., or a .safetensors head."
    ),
    repeat: int = typer.Option(0, min=0, help="Timed rounds; 0: as many as fit in a minute a shape, 3 to 30."),
    softcap: bool = typer.Option(True, help="The model's softcap where it has one."),
    scale: bool = typer.Option(False, help="Sweep N and V instead of the named shapes."),
    out: Path = typer.Option(Path("reports/bench"), help="Folder for results.parquet, rows.jsonl and index.html."),
    fresh: bool = typer.Option(False, help="Measure again what the folder already holds."),
    page: bool = typer.Option(False, "--page-only", help="Measure nothing: draw the page from the folder's rows."),
) -> None:
    """Time, memory and error of every method at every shape, in turn in one run, beside the logits product."""
    from cce_precision.analysis import bench as benchmark

    with bad_option():
        plan = benchmark.plan(
            device=device, shapes=names(shape), methods=names(methods), dtypes=names(dtype), case=case, scale=scale,
            softcap=softcap, repeat=repeat, out=out, fresh=fresh,
        )  # fmt: skip
    if page:
        benchmark.draw(out, console())
        return
    raise typer.Exit(benchmark.run(plan, console()))
