"""Trains a small language model on real text and captures its head at three stages: initial, early (10 %), trained.

    python3 -m cce_precision.analysis.pretrain --text FILE [--text FILE ...] --heldout FILE --minutes 1.5 --out FOLDER

Two presets. `shipped` is a wide body behind a linear map to a narrow head (V = 8192, D = 128): the heads that come with
the library, in compact files. `large` (V = 131,072, D = 1024, tied) is measured where it is trained: `pretrain()`
returns its stages. Text comes from `corpus.py` or is the user's own; the captured rows are consecutive held-out tokens.

Imports torch, tokenizers, safetensors, rich, typer, and of this library only three neighbours, so that it also runs
as a file.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

if __package__:
    from cce_precision.analysis.capture import Capture, as_compact, load_capture
    from cce_precision.analysis.corpus import encode, read_text, train_tokenizer
    from cce_precision.analysis.heads import HeadStatistics, head_statistics, statistics_table
else:
    from capture import Capture, as_compact, load_capture  # type: ignore
    from corpus import encode, read_text, train_tokenizer  # type: ignore
    from heads import HeadStatistics, head_statistics, statistics_table  # type: ignore

EARLY = 0.1  # the share of training after which the second stage is captured
SAVING = ("none", "compact", "full")


@dataclass(frozen=True)
class Preset:
    """Shapes and schedule of one model; `batch` is in sequences of `context` tokens."""

    vocabulary: int
    head_width: int
    width: int
    layers: int
    context: int
    batch: int
    learning_rate: float
    tied: bool
    captured: int  # rows to capture ...
    captured_context: int  # ... in runs of so many consecutive held-out tokens
    save: str  # "compact", "full" or "none"
    head_dim: int = 64
    warmup: int = 100  # steps
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        """Raises ValueError where two fields do not fit together."""
        if self.captured_context > self.context or self.captured % self.captured_context:
            raise ValueError(
                f"captured_context is {self.captured_context}; it divides captured ({self.captured}) and is at most "
                f"context ({self.context})"
            )
        if self.width % self.head_dim:
            raise ValueError(f"width is {self.width}, expected a multiple of head_dim ({self.head_dim})")
        if self.tied and self.head_width != self.width:
            raise ValueError(f"a tied head needs head_width = width, got {self.head_width} and {self.width}")
        if self.save not in SAVING:
            raise ValueError(f"save is {self.save!r}, known are {', '.join(SAVING)}")


PRESETS = {
    "shipped": Preset(8192, 128, 512, 8, 512, 64, 2e-3, False, 1024, 256, "compact"),
    "large": Preset(131_072, 1024, 1024, 8, 512, 32, 1.2e-3, True, 8192, 512, "none"),
}
ON_CPU = {
    "shipped": replace(PRESETS["shipped"], width=256, layers=4, context=256, batch=8, learning_rate=1.5e-3, warmup=50),
    "large": replace(
        PRESETS["large"], width=256, layers=4, context=256, batch=4, head_width=256, captured=1024, captured_context=256
    ),
}


# -- the model ---------------------------------------------------------------------------------------------------------


def rotary(context: int, head_dim: int) -> Tensor:
    """Cosines and sines of rotary position embeddings, float32 (2, context, head_dim / 2)."""
    frequency = 10_000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angle = torch.arange(context)[:, None] * frequency
    return torch.stack((angle.cos(), angle.sin()))


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """x (batch, heads, T, head_dim) turned by its position; table (2, T, head_dim / 2)."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = table
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


class Block(nn.Module):
    """Pre-norm attention with rotary positions, then a SwiGLU."""

    def __init__(self, p: Preset) -> None:
        super().__init__()
        hidden = round(p.width * 8 / 3 / 64) * 64
        self.heads = p.width // p.head_dim
        self.norm1, self.norm2 = nn.RMSNorm(p.width), nn.RMSNorm(p.width)
        self.qkv = nn.Linear(p.width, 3 * p.width, bias=False)
        self.out = nn.Linear(p.width, p.width, bias=False)
        self.gate_up = nn.Linear(p.width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, p.width, bias=False)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """x (batch, T, width) to the same shape."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(rotate(q, table), rotate(k, table), v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class LanguageModel(nn.Module):
    """A decoder; `features` gives the head's input (batch, T, head_width), `head` is its classifier (V, head_width)."""

    def __init__(self, p: Preset) -> None:
        super().__init__()
        self.embed = nn.Embedding(p.vocabulary, p.width)
        self.blocks = nn.ModuleList(Block(p) for _ in range(p.layers))
        self.map = nn.Linear(p.width, p.head_width, bias=False) if p.head_width != p.width else nn.Identity()
        self.norm = nn.RMSNorm(p.head_width)
        self.head = nn.Linear(p.head_width, p.vocabulary, bias=False)
        self.table: Tensor
        self.register_buffer("table", rotary(p.context, p.head_dim), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                small = (2 * p.layers) ** -0.5 if name.endswith(("out.weight", "down.weight")) else 1.0
                nn.init.normal_(parameter, std=0.02 * small)
        if p.tied:
            self.embed.weight = self.head.weight

    def features(self, ids: Tensor) -> Tensor:
        """Token ids (batch, T) to the head's input (batch, T, head_width)."""
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, self.table[:, : ids.shape[1]])
        return self.norm(self.map(x).float())

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of targets (batch, T), as a float32 scalar."""
        return F.cross_entropy(self.head(self.features(ids)).flatten(0, 1).float(), targets.flatten())


# -- training ----------------------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """One captured moment: the head on held-out text, its statistics, and how far the training was."""

    capture: Capture
    master: Capture | None  # before rounding, where a compact file is to be written from it
    statistics: HeadStatistics
    steps: int
    tokens_seen: int
    heldout_loss: float
    train_loss: float | None

    def card(self) -> dict[str, Any]:
        """All but the tensors, for card.json; the losses in it are the training model's own, in its own precision."""
        numbers = {
            "steps": self.steps,
            "tokens_seen": self.tokens_seen,
            "heldout_loss": self.heldout_loss,
            "train_loss": self.train_loss,
        }
        return {**numbers, "statistics": self.statistics.as_dict()}


@dataclass
class Trainer:
    """A run that can be interrupted: everything that changes during training."""

    preset: Preset
    model: LanguageModel
    optimizer: torch.optim.Optimizer
    tokens: Tensor  # (train tokens,), int32, on the device
    heldout: Tensor  # (held-out tokens,), int64, on the device
    seed: int
    step: int = 0
    elapsed: float = 0.0  # seconds of training, compilation left out
    train_loss: float | None = None
    stages: dict[str, Stage] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets (batch, context) of the current step: random windows, drawn from (seed, step) alone."""
        p = self.preset
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        starts = torch.randint(len(self.tokens) - p.context, (p.batch, 1), generator=generator)
        windows = self.tokens[(starts + torch.arange(p.context + 1)).to(self.device)].long()
        return windows[:, :-1], windows[:, 1:]

    def rate(self, progress: float) -> float:
        """Learning rate: linear warm-up in steps, cosine to a hundredth in progress (0 to 1)."""
        p = self.preset
        decay = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return p.learning_rate * decay * min(1.0, (self.step + 1) / p.warmup)

    @torch.no_grad()
    def heldout_loss(self, sequences: int = 128) -> float:
        """Mean loss in nats over evenly spaced held-out windows."""
        context = self.preset.context
        starts = torch.linspace(0, len(self.heldout) - context - 1, min(sequences, len(self.heldout) // context)).long()
        total = 0.0
        for group in starts.split(self.preset.batch):
            windows = torch.stack([self.heldout[s : s + context + 1] for s in group.tolist()])
            with self.autocast():
                total += len(group) * float(self.model(windows[:, :-1], windows[:, 1:]))
        return total / len(starts)

    @torch.no_grad()
    def take(self, name: str) -> None:
        """Captures the head as stage `name`, e and c in bfloat16, or as a compact file will hold them."""
        p = self.preset
        starts = torch.linspace(0, len(self.heldout) - p.captured_context - 1, p.captured // p.captured_context).long()
        windows = torch.stack([self.heldout[s : s + p.captured_context + 1] for s in starts.tolist()])
        with self.autocast():
            e = self.model.features(windows[:, :-1]).flatten(0, 1).bfloat16()
        c = self.model.head.weight.detach().clone()
        about = {"stage": name, "steps": str(self.step), "tokens_seen": str(self.tokens_seen)}
        head = Capture(e, c, windows[:, 1:].flatten(), metadata=about)
        master = head.to("cpu") if p.save == "compact" else None
        head = as_compact(master) if master else head.to(torch.bfloat16)
        statistics = head_statistics(head.e, head.c, head.targets)
        numbers = (self.step, self.tokens_seen, self.heldout_loss(), self.train_loss)
        self.stages[name] = Stage(head, master, statistics, *numbers)

    @property
    def tokens_seen(self) -> int:
        return self.step * self.preset.batch * self.preset.context

    def state(self) -> dict[str, Any]:
        """All that a later run needs to go on."""
        plain = {
            "step": self.step,
            "elapsed": self.elapsed,
            "train_loss": self.train_loss,
            "stages": self.stages,
            "preset": asdict(self.preset),
        }
        return {**plain, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def restore(self, path: Path) -> None:
        """Goes on from a checkpoint; ValueError when it is of another model."""
        state = torch.load(path, map_location=self.device, weights_only=False)
        if state["preset"] != asdict(self.preset):
            raise ValueError(f"{path} is a checkpoint of another preset: {state['preset']}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.elapsed, self.train_loss, self.stages = (
            state[k] for k in ("step", "elapsed", "train_loss", "stages")
        )


def make_trainer(preset: Preset, tokens: np.ndarray, heldout: np.ndarray, device: torch.device, seed: int) -> Trainer:
    """A fresh run. tokens, heldout: integers (count,); ValueError when there are too few of them."""
    for name, ids, needed in (
        ("training", tokens, preset.context + 2),
        ("held-out", heldout, max(preset.captured, preset.context) + 2),
    ):
        if len(ids) < needed:
            raise ValueError(f"the {name} text has {len(ids)} tokens, at least {needed} are needed")
    torch.manual_seed(seed)
    model = LanguageModel(preset).to(device)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": preset.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=device.type == "cuda")
    return Trainer(
        preset, model, optimizer, torch.from_numpy(tokens).to(device), torch.from_numpy(heldout).long().to(device), seed
    )


def train(
    run: Trainer, *, minutes: float | None, steps: int | None, compiled: bool, checkpoint: Path | None, console: Console
) -> None:
    """Trains to the end of the budget (training time, or a number of steps), taking the three stages on the way.

    With `steps` the run is reproducible up to the device's own order of summation; with `minutes` the schedule follows
    the clock. Ctrl-C writes the checkpoint, when there is one, and raises KeyboardInterrupt.
    """
    if (minutes is None) == (steps is None):
        raise ValueError(f"give minutes or steps, not both and not neither (minutes={minutes}, steps={steps})")
    seconds = 60 * (minutes or 0)
    loss_of: Callable[[Tensor, Tensor], Tensor] = torch.compile(run.model, dynamic=False) if compiled else run.model
    if "initial" not in run.stages:
        run.take("initial")
    columns = (
        TextColumn("step {task.fields[step]}  loss {task.fields[loss]}  {task.fields[speed]} tokens/s"),
        BarColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0, step=run.step, loss="-", speed="-")
        begun, first, marked = run.elapsed, run.step, time.perf_counter()
        try:
            while (progress := run.step / steps if steps else run.elapsed / seconds) < 1:
                if progress >= EARLY and "early" not in run.stages:
                    run.take("early")
                    marked = time.perf_counter()
                for group in run.optimizer.param_groups:
                    group["lr"] = run.rate(progress)
                with run.autocast():
                    loss = loss_of(*run.batch())
                loss.backward()
                nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
                run.optimizer.step()
                run.optimizer.zero_grad(set_to_none=True)
                run.step += 1
                if run.step % 10 == 0 or run.step - first < 3 or run.device.type == "cpu":
                    run.train_loss = loss.item()  # waits for the device, so that the clock is right
                    if not math.isfinite(run.train_loss):
                        raise FloatingPointError(
                            f"the loss is {run.train_loss} at step {run.step}; lower the learning rate"
                        )
                    now = time.perf_counter()
                    if run.step - first > 2:  # the first steps compile
                        run.elapsed += now - marked
                    marked = now
                    if run.step % 200 == 0 and not console.is_terminal:
                        console.print(f"step {run.step}  loss {run.train_loss:.3f}  {progress:.0%}")
                    speed = (
                        (run.step - first - 2) * run.preset.batch * run.preset.context / max(1e-9, run.elapsed - begun)
                    )
                    bar.update(
                        task,
                        completed=progress,
                        step=run.step,
                        loss=f"{run.train_loss:.3f}",
                        speed=f"{max(0, speed):,.0f}",
                    )
        except KeyboardInterrupt:
            if checkpoint:
                torch.save(run.state(), checkpoint)
                console.print(f"interrupted at step {run.step}; the same command goes on from {checkpoint}")
            raise
    if "early" not in run.stages:
        raise ValueError(f"the budget ended after {run.step} steps, before the early stage could be taken; give more")
    run.take("trained")


# -- from text to files ------------------------------------------------------------------------------------------------


def pretrain(
    text: Sequence[Path],
    heldout: Path | None = None,
    *,
    preset: Preset,
    tokenizer: Path | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    device: str = "cpu",
    seed: int = 0,
    compiled: bool | None = None,
    checkpoint: Path | None = None,
    console: Console | None = None,
) -> tuple[Trainer, dict[str, Any]]:
    """Reads, tokenises, trains and captures; returns the run, whose `stages` hold the heads in memory, and its card.

    Without `heldout` the last twentieth of the text is held out. Without `tokenizer` one is trained on the text.
    """
    from tokenizers import Tokenizer

    console = console or Console()
    started = time.perf_counter()
    training, held = read_text(text), read_text([heldout]) if heldout else ""
    if not heldout:
        training, held = training[: -len(training) // 20], training[-len(training) // 20 :]
    bpe = Tokenizer.from_str(read_text([tokenizer])) if tokenizer else train_tokenizer(training, preset.vocabulary)
    if bpe.get_vocab_size() != preset.vocabulary:
        raise ValueError(
            f"{tokenizer} has a vocabulary of {bpe.get_vocab_size()}, the preset needs {preset.vocabulary}"
        )
    tokens, held_tokens = encode(bpe, training), encode(bpe, held)
    console.print(
        f"{len(tokens) / 1e6:.1f} M tokens to train on, {len(held_tokens):,} held out, read in "
        f"{time.perf_counter() - started:.0f} s"
    )
    where = torch.device(device)
    torch.set_float32_matmul_precision("high")
    run = make_trainer(preset, tokens, held_tokens, where, seed)
    if checkpoint and checkpoint.exists():
        run.restore(checkpoint)
    train(
        run,
        minutes=minutes,
        steps=steps,
        compiled=where.type == "cuda" if compiled is None else compiled,
        checkpoint=checkpoint,
        console=console,
    )
    gpu = torch.cuda.get_device_name(where) if where.type == "cuda" else platform.machine()
    sources = text[0].parent / "sources.json"
    card = {
        "preset": asdict(preset),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "training": {
            "tokens": len(tokens),
            "seconds": round(run.elapsed, 1),
            "seed": seed,
            "device": gpu,
            "torch": torch.__version__,
        },
        "tokenizer_sha256": hashlib.sha256(bpe.to_str().encode()).hexdigest(),
        "text": json.loads(sources.read_text()) if heldout and sources.exists() else "the user's own",
        "stages": {name: stage.card() for name, stage in run.stages.items()},
    }
    return run, card


def write(run: Trainer, card: dict[str, Any], out: Path) -> None:
    """Writes OUT/card.json and, unless the preset's `save` is "none", OUT/captured-STAGE.safetensors."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    for name, stage in run.stages.items():
        path = out / f"captured-{name}.safetensors"
        if run.preset.save != "none":
            (stage.master or stage.capture).save(path, compact=stage.master is not None)
            if not torch.equal(load_capture(path).c, stage.capture.c.cpu()):
                raise RuntimeError(f"{path} does not read back as the head that the card describes")


def main(
    text: list[Path] = typer.Option(..., help="Training text: plain, .xz or .gz; see corpus.py."),
    out: Path = typer.Option(..., help="Folder for card.json and the captured heads."),
    heldout: Path | None = typer.Option(
        None, help="Text to capture on; by default the last twentieth of the training text."
    ),
    preset: str = typer.Option("shipped", help="shipped or large."),
    tokenizer: Path | None = typer.Option(
        None, help="A tokenizers JSON file (or .xz of one); by default one is trained on the text."
    ),
    minutes: float | None = typer.Option(None, help="Training time, 1.5 unless --steps is given."),
    steps: int | None = typer.Option(None, help="Number of steps instead of a time."),
    device: str = typer.Option("", help="cuda or cpu; by default what there is."),
    save: str = typer.Option("", help="none, compact or full; by default the preset's."),
    seed: int = 0,
    checkpoint: Path | None = typer.Option(None, help="Written on Ctrl-C; read at the start when it exists."),
) -> None:
    """Trains a small language model and captures its head at three stages."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    presets = ON_CPU if device == "cpu" else PRESETS
    if preset not in presets:
        raise typer.BadParameter(f"--preset is {preset!r}, known are {', '.join(presets)}")
    chosen = replace(presets[preset], save=save) if save else presets[preset]
    console = Console(width=None if sys.stdout.isatty() else 120)
    budget = 1.5 if minutes is None and steps is None else minutes
    run, card = pretrain(
        text,
        heldout,
        preset=chosen,
        tokenizer=tokenizer,
        minutes=budget,
        steps=steps,
        device=device,
        seed=seed,
        checkpoint=checkpoint,
        console=console,
    )
    write(run, card, out)
    console.print(f"{run.step} steps, {run.tokens_seen / 1e6:.1f} M tokens in {run.elapsed:.0f} s")
    for name, stage in run.stages.items():
        console.print(f"{name}: held-out loss {stage.heldout_loss:.3f} after {stage.tokens_seen / 1e6:.1f} M tokens")
    console.print(statistics_table({name: stage.statistics for name, stage in run.stages.items()}))


if __name__ == "__main__":
    typer.run(main)
