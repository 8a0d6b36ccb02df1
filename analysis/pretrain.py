"""Trains a small language model on real text and captures its head on the way: initial, early (10 %), middle, trained.

`cce-precision capture --train` runs it and measures each stage as it is taken (`capture_training.py`).

Presets. `shipped` is a wide body behind a linear map to a narrow head (V = 8192, D = 128): the heads that come with the
library, in compact files. `large` (V = 131,072, D = 1024, tied) is measured where it is trained: `pretrain()` returns
its stages. `tiny` shows in seconds that all works. Text comes from `corpus.py` or is the user's own; the captured rows
are consecutive held-out tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from cce_precision.analysis.capture import Capture, as_compact, load_capture
from cce_precision.analysis.corpus import encode, read_text, train_tokenizer
from cce_precision.analysis.heads import HeadStatistics, head_statistics
from cce_precision.analysis.train import stop_signals

MOMENTS = {"initial": 0.0, "early": 0.1, "middle": 0.5, "trained": 1.0}  # stages, and the share of training before each
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
    "tiny": Preset(1024, 64, 128, 2, 128, 8, 3e-3, False, 256, 128, "compact", warmup=10),
}
ON_CPU = {
    "tiny": PRESETS["tiny"],
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

    def train_step(self, loss_of: Callable[[Tensor, Tensor], Tensor], progress: float) -> Tensor:
        """One step of the optimiser; the loss before it, a float32 scalar on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(progress)
        with self.autocast():
            loss = loss_of(*self.batch())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.detach()

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

    def save(self, path: Path) -> None:
        """Writes all that a later run needs to go on, the whole file or none of it."""
        plain = {
            "step": self.step,
            "elapsed": self.elapsed,
            "train_loss": self.train_loss,
            "stages": self.stages,
            "preset": asdict(self.preset),
        }
        draft = path.with_suffix(".tmp")
        try:
            torch.save({**plain, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, draft)
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)

    def check_space(self, folder: Path) -> None:
        """Raises ValueError where the folder's disk has no room for two checkpoints, an old one and a new one."""
        p = self.preset
        head = p.head_width * (p.captured + p.vocabulary)
        kept = (2 if p.save == "none" else 8) * head  # bytes of a stage: bf16, beside its fp32 master and its file
        needed = 2 * (3 * 4 * sum(x.numel() for x in self.model.parameters()) + len(MOMENTS) * kept)
        if (free := shutil.disk_usage(folder).free) < needed:
            raise ValueError(
                f"{folder} has {free / 1e6:,.0f} MB free, the checkpoints of this run need {needed / 1e6:,.0f} MB"
            )

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


OnStage = Callable[[str, Stage], None]


def train(
    run: Trainer,
    *,
    minutes: float | None,
    steps: int | None,
    compiled: bool,
    checkpoint: Path | None,
    console: Console,
    on_stage: OnStage = lambda name, stage: None,
) -> None:
    """Trains to the end of the budget (training time, or a number of steps), taking the stages on the way.

    With `steps` the run is reproducible up to the device's own order of summation; with `minutes` the schedule follows
    the clock. `on_stage` is told of each stage as it is taken, of a restored run's too; its time is no training time.
    The checkpoint, where there is one, is written at each stage and on Ctrl-C, which raises KeyboardInterrupt.
    """
    if (minutes is None) == (steps is None):
        raise ValueError(f"give minutes or steps, not both and not neither (minutes={minutes}, steps={steps})")
    seconds = 60 * (minutes or 0)
    loss_of: Callable[[Tensor, Tensor], Tensor] = torch.compile(run.model, dynamic=False) if compiled else run.model
    columns = (
        TextColumn("step {task.fields[step]}  loss {task.fields[loss]}  {task.fields[speed]} tokens/s"),
        BarColumn(),
        TimeRemainingColumn(),
    )
    first, begun = run.step, run.elapsed
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar, _kept(run, checkpoint, console):
        task = bar.add_task("", total=1.0, step=run.step, loss="-", speed="-")

        def progress() -> float:
            done = min(1.0, run.step / steps if steps else run.elapsed / seconds)
            seen = (run.step - first - 2) * run.preset.batch * run.preset.context
            speed, loss = max(0, seen / max(1e-9, run.elapsed - begun)), run.train_loss or math.nan
            bar.update(task, completed=done, step=run.step, loss=f"{loss:.3f}", speed=f"{speed:,.0f}")
            return done

        for name, moment in MOMENTS.items():
            marked = time.perf_counter()
            with stop_signals() as asked:
                while (done := progress()) < moment and not asked():
                    loss = run.train_step(loss_of, done)
                    if run.step % 10 and run.step - first > 2 and run.device.type != "cpu":
                        continue  # the loss is left on the device
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
                        console.print(f"step {run.step}  loss {run.train_loss:.3f}  {done:.0%}")
            if asked():
                raise KeyboardInterrupt
            if name not in run.stages:
                if name == "early" and done == 1:
                    raise ValueError(
                        f"the budget ended after {run.step} steps, before the early stage could be taken; give more"
                    )
                run.take(name)
                if checkpoint:
                    run.save(checkpoint)
            on_stage(name, run.stages[name])


@contextlib.contextmanager
def _kept(run: Trainer, checkpoint: Path | None, console: Console) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if checkpoint:
            run.save(checkpoint)
            console.print(f"interrupted at step {run.step}; the same command goes on from {checkpoint}")
        raise


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
    on_stage: OnStage = lambda name, stage: None,
) -> tuple[Trainer, dict[str, Any]]:
    """Reads, tokenises, trains and captures; returns the run, whose `stages` hold the heads in memory, and its card.

    Without `heldout` the last twentieth of the text is held out. Without `tokenizer` one is trained on the text.
    `on_stage` is told of each stage as it is taken, see `train`. Raises FileNotFoundError for missing files, ValueError
    for texts that are too short, a tokenizer of another vocabulary, and a disk without room for the checkpoint.
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
        f"{len(tokens):,} tokens to train on, {len(held_tokens):,} held out, read in "
        f"{time.perf_counter() - started:.0f} s"
    )
    where = torch.device(device)
    torch.set_float32_matmul_precision("high")
    run = make_trainer(preset, tokens, held_tokens, where, seed)
    if checkpoint:
        run.check_space(checkpoint.parent)
        if checkpoint.exists():
            run.restore(checkpoint)
    train(
        run,
        minutes=minutes,
        steps=steps,
        compiled=where.type == "cuda" if compiled is None else compiled,
        checkpoint=checkpoint,
        console=console,
        on_stage=on_stage,
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
