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
from typing import Any

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
    "accelerate": "transformers",
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
    """Turns an error about an option (a value, a missing file) into the command's own, with exit code 2."""
    try:
        yield
    except (ValueError, TypeError, FileNotFoundError) as error:
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
        operand = variant.operand.value + (", flushed" if variant.flushed else "")
        table.add_row(variant.name, *filters, operand, sums)
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
    budget: bool = typer.Option(True, help="Also where the errors come from, and their bounds."),
    against: Path | None = typer.Option(
        None, help="An earlier results.parquet: say what changed, and exit with 1 where an error grew."
    ),
    page: bool = typer.Option(False, "--page-only", help="Measure nothing: draw the page from results.parquet."),
) -> None:
    """Error of every variant against its threshold on real heads: a table, figures, a page that says which to take."""
    from cce_precision.analysis import engines, sweep
    from cce_precision.analysis import report as reporting

    with bad_option("--against"):
        earlier = None if against is None else reporting.load(against)
    if page:
        with bad_option("--out"):
            raise typer.Exit(reporting.redraw(out, console(), earlier))
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
            budget=budget,
        )
    command = shlex.join(["cce-precision", *sys.argv[1:]])
    raise typer.Exit(reporting.run(plan, out, chosen, command, console(), notes, earlier))


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
    limit: float = typer.Option(0, min=0, help="Most seconds for a method's first call; 0: any."),
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
            softcap=softcap, repeat=repeat, out=out, fresh=fresh, limit=limit,
        )  # fmt: skip
    if page:
        benchmark.draw(out, console())
        return
    raise typer.Exit(benchmark.run(plan, console()))


@app.command()
def fuzz(
    minutes: float = typer.Option(0.0, min=0.0, help="Stop after this long; 0: after --problems, or 10 minutes."),
    problems: int = typer.Option(0, min=0, help="Stop after so many problems; 0: after --minutes."),
    backend: str = typer.Option("eager", help="eager, interpreter (Triton's kernels on the CPU), emulated or cuda."),
    seed: int = typer.Option(0, help="Seed of the campaign: each problem follows from it and its number."),
    variants: str = typer.Option("all", help="Variants by name, separated by commas, or all."),
    workers: int = typer.Option(0, min=0, help="Processes; 0: this one (the interpreter always has one of its own)."),
    out: Path = typer.Option(Path("reports/fuzz"), help="Folder; a campaign that it holds goes on."),
    replay: Path = typer.Option(None, help="Judge stored failures again: a folder of campaigns, or one file."),
) -> None:
    """Random problems against derived bounds; errors above their bound are stored, made small, and can be replayed."""
    import torch

    from cce_precision.analysis import fuzz_campaign
    from cce_precision.analysis.fuzz_summary import holds
    from cce_precision.variants import ALL, get

    torch.set_num_threads(1)
    if replay is not None:
        with bad_option("--replay"):
            rows = fuzz_campaign.replay(replay, workers)
        for row in rows:
            said = "holds" if holds(row) else f"FAILS: {row.get('error', 'an error exceeds its bound')}"
            console().print(f"{row['file']} ({row['backend']}) {json.dumps(row['knobs'])}: {said}", markup=False)
        raise typer.Exit(0 if all(map(holds, rows)) else 1)
    with bad_option("--backend/--variants"):
        found = fuzz_campaign.campaign(
            problems or None,
            out,
            seed=seed,
            minutes=minutes or (None if problems else 10.0),
            impls=tuple(ALL) if variants == "all" else tuple(get(name).name for name in names(variants)),
            backend=backend,
            workers=workers,
        )
    console().print((out / "index.md").read_text(), markup=False)
    raise typer.Exit(1 if found["violations"] else 0)


@app.command()
def train(
    model: Path | None = typer.Option(None, help="Folder of a pretrained model to go on from, with its tokenizer."),
    config: str = typer.Option("llama", help="Without --model: a family of transformers, or a config.json."),
    size: str = typer.Option("tiny", help="Of a family: tiny, small, medium or large."),
    impl: str = typer.Option("cce_exact", help="The loss: a variant (cce@2^-10: its threshold), fp32 or unpatched."),
    compare: str = typer.Option("", help="Several losses, separated by commas, the reference first: a comparison."),
    seeds: int = typer.Option(1, min=1, help="Runs of each loss, from --seed on."),
    seed: int = typer.Option(0, help="Draws weights and the order of the windows."),
    text: list[Path] = typer.Option([], help="Text or JSON lines, plain, .xz or .gz; none: the text that is shipped."),
    heldout: Path | None = typer.Option(None, help="Text to evaluate on; none: a twentieth of the text."),
    field: str = typer.Option("text", help="The field of a JSON line that holds its text."),
    megabytes: float | None = typer.Option(None, min=0.01, help="Only so many million characters of the text."),
    tokenizer: Path | None = typer.Option(None, help="A tokenizer's JSON file; none: the model's, or a new one."),
    vocabulary: int = typer.Option(4096, min=257, help="Entries of a new tokenizer."),
    context: int = typer.Option(128, help="Tokens of a window."),
    batch: int = typer.Option(16, help="Windows a step, over all processes."),
    accumulate: int = typer.Option(1, help="Micro-batches of a step."),
    steps: int = typer.Option(200, help="Optimiser steps."),
    learning_rate: float = typer.Option(1e-3, help="Its peak, after the warm-up of a tenth of the steps."),
    precision: str = typer.Option("auto", help="fp32, bf16 (autocast), pure-bf16 (weights too); auto: bf16 on a GPU."),
    heldout_every: int = typer.Option(50, help="Steps between held-out losses."),
    gradient_every: int = typer.Option(0, help="Steps between measurements of the head's gradients; 0: none."),
    checkpoint_every: int = typer.Option(100, help="Steps between checkpoints; 0: only when stopped."),
    minutes: float | None = typer.Option(None, help="Stops after so long, as Ctrl-C does."),
    processes: int = typer.Option(1, min=1, help="Runs of a comparison at a time, each a process."),
    device: str = typer.Option("auto", help="cpu, or auto: a GPU where there is one."),
    out: Path = typer.Option(Path("reports/train"), help="Folder of the run; the same command resumes there."),
    fresh: bool = typer.Option(False, help="Throw away what the folder holds of earlier runs."),
    page: bool = typer.Option(False, "--page-only", help="Train nothing: draw the page from the folder's runs.jsonl."),
) -> None:
    """Train a transformers model on local text with any variant, or compare variants from the same start."""
    from cce_precision.analysis import train_command
    from cce_precision.analysis.train import Recipe

    with bad_option():
        if page:
            train_command.draw(out, console())
            return
        gpu = train_command.on_gpu(device)
        precision = {"auto": "bf16" if gpu else "fp32"}.get(precision, precision)
        recipe = Recipe(
            impl, None if model is None else str(model), config, size, context, batch, accumulate, steps,
            learning_rate, warmup=steps // 10, precision=precision, seed=seed,
            heldout_every=heldout_every, gradient_every=gradient_every, checkpoint_every=checkpoint_every,
        )  # fmt: skip
        reading = {"tokenizer": tokenizer, "vocabulary": vocabulary, "field": field, "megabytes": megabytes}
        code = train_command.start(
            recipe, text, heldout, reading, out, console(), methods=names(compare), seeds=seeds, fresh=fresh,
            device=None if gpu else "cpu", processes=processes, minutes=minutes,
        )  # fmt: skip
    raise typer.Exit(code)


@app.command()
def capture(
    train: bool = typer.Option(False, "--train", help="Train the model here; the command's one mode."),
    preset: str = typer.Option("shipped", help="tiny, shipped or large (smaller on a CPU)."),
    text: list[Path] = typer.Option([], help="Text to train on, plain, .xz or .gz; none: the text that is shipped."),
    heldout: Path | None = typer.Option(None, help="Text to capture on; none: the last twentieth of the text."),
    tokenizer: Path | None = typer.Option(None, help="A tokenizer's JSON file (or .xz of one); none: a new one."),
    minutes: float | None = typer.Option(None, help="Training time; 1.5 unless --steps is given."),
    steps: int | None = typer.Option(None, help="Steps of training instead of a time."),
    impl: str = typer.Option("all", help="Variants to measure, by name, separated by commas, or all."),
    rows: int = typer.Option(256, min=1, help="Rows of each gradient to look at."),
    save: str = typer.Option("", help="The heads: none, compact or full files; none given: the preset's."),
    device: str = typer.Option("auto", help="cpu, cuda or auto."),
    seed: int = typer.Option(0, help="Draws weights, windows, the sample and what variants draw."),
    out: Path = typer.Option(Path("reports/capture"), help="Folder of the run; the same command resumes there."),
    fresh: bool = typer.Option(False, help="Throw away what the folder holds of an earlier run."),
    page: bool = typer.Option(False, "--page-only", help="Train nothing: draw the page of the folder's run."),
) -> None:
    """Train a language model on real text, capture its head on the way, and measure every variant on it."""
    from cce_precision.analysis import capture_page, capture_training, sampled

    with bad_option():
        if page:
            console().print(str(capture_page.build(out)))
            return
        if not train:
            raise ValueError("give --train; a head of your own model: cce_precision.analysis.capture(model, batch)")
        budget = 1.5 if minutes is None and steps is None else minutes
        recipe = capture_training.Recipe(
            preset, sampled.device_of(device), tuple(text) or (capture_training.SHIPPED,), heldout, tokenizer, budget,
            steps, seed, save, tuple(sampled.impls(impl)), rows,
        )  # fmt: skip
        if fresh:
            capture_training.clear(out)
        raise typer.Exit(capture_training.run(recipe, out, console()))


@app.command()
def measure(
    head: str = typer.Argument("captured", help="A captured head, FILE.safetensors, or a case's name."),
    impl: str = typer.Option("baseline,cce_exact", help="Variants by name, separated by commas, or all."),
    dtype: str = typer.Option("auto", help="bf16, fp16, fp32; auto: as captured."),
    tokens: int = typer.Option(0, min=0, help="Only so many tokens; 0: all."),
    device: str = typer.Option("auto", help="cpu, cuda or auto."),
    rows: int = typer.Option(256, min=1, help="Tokens to look at."),
    columns: int = typer.Option(256, min=1, help="Vocabulary rows to look at."),
    confidence: float = typer.Option(0.95, help="Of the intervals."),
    lse: str = typer.Option("auto", help="Log-sum-exps of the tokens not looked at: fp32 (with a radius) or fp64."),
    workspace_mb: int = typer.Option(0, min=0, help="Workspace of the variants in MiB; 0: the default."),
    seed: int = typer.Option(0, help="Seed of the sample, of synthetic cases and of variants that sample."),
    as_json: bool = typer.Option(False, "--json", help="The results as JSON."),
) -> None:
    """Exact errors of variants on a head of any size, from a random sample of rows, with confidence intervals."""
    from cce_precision.analysis import sampled

    with bad_option():
        case, chosen = sampled.load(head, dtype, tokens or None, device, seed), sampled.impls(impl)
    results = {}
    with bad_option(), console().status("measuring") as status:
        for name in chosen:
            status.update(f"{name} on {case.name}")
            results[name] = sampled.measure_impl(
                case, name, workspace_mb or None, impl_seed=seed, rows=rows, columns=columns, seed=seed,
                confidence=confidence, lse=lse,
            )  # fmt: skip
    if as_json:
        print(json.dumps({name: one.as_dict() for name, one in results.items()}, indent=2))
    else:
        first = next(iter(results.values()))
        console().print(sampled.table(results, f"{case.name}: N={first.n}, V={first.v}, D={first.d}, {first.dtype}"))


@app.command()
def audit(
    target: list[str] = typer.Argument(
        [], help="torch, cut-cross-entropy, liger, fla, quack, a variant, or module:function."
    ),
    style: str = typer.Option("ours", help="How module:function takes its arguments: ours, functional, fla, ..."),
    device: str = typer.Option("auto", help="cpu, cuda or auto."),
    checks: str = typer.Option("all", help="Checks by name, separated by commas, or all."),
    workers: int = typer.Option(2, min=1, help="Checks at a time, each in a process of its own."),
    out: Path = typer.Option(Path("reports/audit"), help="Folder for the cards and their page."),
    page: bool = typer.Option(False, "--page-only", help="Check nothing: draw the page from the folder's cards."),
) -> None:
    """Checks any implementation for the field's traps: a report card, and a program of a few lines for each failure."""
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from cce_precision.analysis import audit as auditing
    from cce_precision.analysis import audit_page, audit_targets
    from cce_precision.analysis.audit_checks import CHECKS

    if page:
        with bad_option("--out"):
            console().print(str(audit_page.build(out)))
        return
    if not target:
        raise typer.BadParameter("name one or more", param_hint="'TARGET'")
    chosen = list(CHECKS) if checks == "all" else names(checks)
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    with bad_option("TARGET/--style"):
        targets = list(dict.fromkeys(found for text in target for found in audit_targets.targets(text, style)))
    screen = console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with bad_option("--device/--checks"), Progress(*columns, console=screen) as bar:
        task = bar.add_task("audit", total=len(targets) * len(chosen))
        cards = auditing.audit(
            targets,
            where,
            checks=chosen,
            workers=workers,
            command=shlex.join(["cce-precision", *sys.argv[1:]]),
            on_outcome=lambda found, outcome: bar.update(task, advance=1, description=f"{found.name}: {outcome.check}"),
        )
    auditing.write(cards, out)
    for card in cards:
        screen.print(audit_page.table(card))
        for outcome in card.outcomes:
            if outcome.snippet:
                screen.print(f"{card.target}, {outcome.check}:\n\n{outcome.snippet}", markup=False, highlight=False)
    screen.print(str(audit_page.build(out)))
    raise typer.Exit(1 if any(card.count("fail") for card in cards) else 0)


@app.command()
def choose(
    tolerance: float = typer.Option(
        0.0, min=0.0, help="Largest relative error of dE and dC; 0: no less exact than PyTorch's own loss."
    ),
    data: str = typer.Option(
        "", help="Measure on this head: FILE.safetensors or a case's name; without it and --vocab: captured."
    ),
    tokens: int = typer.Option(
        0, min=0, help="Tokens of the step to predict for; of --data: only so many. 0: 8192; all."
    ),
    vocab: int = typer.Option(0, min=0, help="Vocabulary to predict for."),
    dim: int = typer.Option(0, min=0, help="Width to predict for."),
    dtype: str = typer.Option("auto", help="bf16, fp16, fp32; auto: as captured, bf16 for a prediction."),
    softmax: str = typer.Option("", help="Kind to predict for: flat, diffuse, peaked; without it the worst of them."),
    memory_mb: float = typer.Option(0.0, min=0.0, help="Most MiB beyond the inputs, gradients included; 0: no limit."),
    device: str = typer.Option("auto", help="cpu, cuda or auto."),
    impl: str = typer.Option("all", help="Candidates to measure, by name, separated by commas."),
    rows: int = typer.Option(256, min=1, help="Rows of each gradient to look at, more where they do not decide."),
    seed: int = typer.Option(0, help="Seed of the sample, of synthetic cases and of variants that sample."),
    threads: int = typer.Option(1, min=1, help="Of a CPU; a single one counts its own time, whatever else runs."),
    as_json: bool = typer.Option(False, "--json", help="The choice as JSON."),
) -> None:
    """Which variant to take: by measurement on data, or by prediction for --tokens, --vocab and --dim; exit code 1 if
    none meets the demands."""
    import torch

    from cce_precision import choosing
    from cce_precision.analysis import choose as choices
    from cce_precision.analysis import sampled

    torch.set_num_threads(threads)
    limits: dict[str, Any] = {"tolerance": tolerance or None, "memory_mb": memory_mb or None}
    with bad_option():
        if bool(vocab) != bool(dim):
            raise ValueError("--vocab and --dim go together")
        if vocab and data:
            raise ValueError("--data measures on a head; --vocab and --dim predict for a shape: give one of the two")
        if softmax and not vocab:
            raise ValueError("--softmax is for a prediction (--vocab, --dim); data show theirs")
        if vocab:
            kind, place = sampled.dtype_of(dtype), sampled.device_of(device)
            title = f"N={tokens or 8192}, V={vocab}, D={dim}, {dtype if kind else 'bf16'}, {place}"
            shape = (tokens or 8192, vocab, dim)
            limits |= {"dtype": kind or torch.bfloat16, "device": place, "softmax": softmax or None}
            found = choosing.choose(*shape, **limits)
        else:
            case = sampled.load(data or "captured", dtype, tokens or None, device, seed)
            title = f"{case.name}: N={case.n}, V={case.v}, D={case.d}, {case.operand_dtype}, {case.e.device.type}"
            with console().status("measuring") as status:
                found = choices.measured(
                    case, impls=choices.names(impl), rows=rows, seed=seed, say=status.update, **limits
                )
    if as_json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        console().print(choices.table(found, title))
    raise typer.Exit(0 if found.best else 1)


@app.command()
def census(
    out: Path = typer.Option(Path("reports/transformers"), help="Folder for models.csv and README.md."),
    only: str = typer.Option("", help="Model types, separated by commas; all without."),
    fresh: bool = typer.Option(False, help="Check again what the folder already holds of this transformers."),
) -> None:
    """Every causal language model of the installed transformers under cce_patch: loss and gradients, no logits."""
    from cce_precision.analysis import census as counting

    with bad_option("--only"):
        counting.run(out, names(only), fresh, console())
