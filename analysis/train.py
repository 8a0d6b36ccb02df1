"""Trains a transformers model with any variant as its loss: `cce-precision train`.

A run is a folder: recipe.json (what was asked for), curve.jsonl (one line a measurement, written as the run goes),
checkpoint-STEP/ (the last one), model/ (the end). The same command on a folder that holds a checkpoint goes on from
it; with a deterministic variant, and one with the sampled variants' draws in the checkpoint, to bitwise the same curve.

Lines of curve.jsonl: {"kind": "train", "step", "loss", "grad_norm", "lr", "tokens", "seconds", "tokens_per_second",
"peak_mib"}, {"kind": "heldout", "step", "loss"} and {"kind": "gradient", "step", "dE", "dC", ...}. `step` counts
finished steps; a training loss is that of the weights before its step. The held-out loss is the model's own in the
dtype of its weights, without autocast, so that it compares what was learnt and not how it is evaluated.

Processes: `accelerate launch -m cce_precision train ...` or torchrun; `--batch` is what all of them do in a step.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cce_precision.analysis.train_models import Method, build, prepare
from cce_precision.analysis.train_text import Order, Tokens

__all__ = ["Outcome", "Recipe", "run"]

PRECISIONS = ("fp32", "bf16", "pure-bf16")
STOPS = (signal.SIGINT, signal.SIGTERM)

Row = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run beside the tokens. Raises ValueError for values that do not go together."""

    method: str = "cce_exact"  # see `train_models.Method`
    model: str | None = None  # folder of a pretrained model, or ...
    config: str = "llama"  # ... a family or a config.json, initialised from the seed
    size: str = "tiny"
    context: int = 128  # tokens of a window
    batch: int = 16  # windows a step, over all processes and micro-batches
    accumulate: int = 1  # micro-batches a step
    steps: int = 100
    learning_rate: float = 1e-3
    warmup: int = 20  # steps
    weight_decay: float = 0.1
    clip: float = 1.0  # largest norm of the gradient
    precision: str = "fp32"  # of weights and activations; "bf16": fp32 weights under autocast
    seed: int = 0
    deterministic: bool = True  # PyTorch's deterministic algorithms
    heldout_every: int = 50  # steps; 0: at the end alone
    heldout_windows: int = 64
    gradient_every: int = 0  # steps; 0: never
    checkpoint_every: int = 100  # steps; 0: only when stopped
    log_every: int = 10  # steps between two looks at the device

    def __post_init__(self) -> None:
        Method.parse(self.method)
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}, allowed are {', '.join(PRECISIONS)}")
        for name in ("context", "batch", "accumulate", "steps", "log_every", "heldout_windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be at least 1")
        for name in ("warmup", "heldout_every", "gradient_every", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, it must not be negative")
        for name in ("learning_rate", "clip"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} is {getattr(self, name)}, it must be a finite number > 0")
        if self.context < 2:
            raise ValueError("context is 1: a window needs two tokens, one to predict from and one to predict")

    def rate(self, step: int) -> float:
        """Learning rate of step `step`: linear warm-up, then a cosine to a tenth."""
        done = min(1.0, step / self.steps)
        decay = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))
        return self.learning_rate * decay * min(1.0, (step + 1) / max(1, self.warmup))

    @property
    def weights(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "pure-bf16" else torch.float32


class Outcome(NamedTuple):
    """How a run ended."""

    finished: bool  # False: stopped, the same command goes on
    step: int
    curve: list[Row]


# -- the curve ---------------------------------------------------------------------------------------------------------


def read_curve(out: Path) -> list[Row]:
    """The lines of a run's curve; a last line that was cut off by a kill is left out."""
    path = out / "curve.jsonl"
    rows: list[Row] = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def _rewind(out: Path, step: int) -> None:
    """Cuts from the curve what lies beyond a checkpoint."""
    kept = [row for row in read_curve(out) if row["step"] <= step]
    part = out / "curve.jsonl.part"
    part.write_text("".join(json.dumps(row) + "\n" for row in kept))
    part.replace(out / "curve.jsonl")


def peak_mib(device: torch.device) -> float:
    """Largest memory so far: of the allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**20 if sys.platform == "darwin" else 2**10)


# -- one run -----------------------------------------------------------------------------------------------------------


@dataclass
class Trainer:
    """A run in the making: the recipe, what accelerate prepared, and the steps done."""

    recipe: Recipe
    out: Path
    order: Order
    heldout: Order
    accelerator: Any  # accelerate.Accelerator
    model: nn.Module  # prepared
    optimizer: torch.optim.Optimizer
    on_row: Callable[[Row], None]
    step: int = 0
    seconds: float = 0.0

    @property
    def plain(self) -> nn.Module:
        """The model without what accelerate put around it."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16")

    def shard(self, step: int) -> list[Tensor]:
        """This process' micro-batches of a step, token ids (windows, context) each."""
        r, rank, count = self.recipe, self.accelerator.process_index, self.accelerator.num_processes
        own = self.order.indices(step)[rank::count]
        size = len(own) // r.accumulate
        return [self.order.take(own[i * size : (i + 1) * size]).to(self.device) for i in range(r.accumulate)]

    def train_step(self) -> tuple[Tensor, Tensor]:
        """One optimiser step; (mean loss of this process' tokens, gradient norm before clipping), on the device."""
        r = self.recipe
        total = torch.zeros((), device=self.device)
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = r.rate(self.step)
        for i, ids in enumerate(self.shard(self.step)):
            last = i == r.accumulate - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                with self.autocast():
                    loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
                self.accelerator.backward(loss / r.accumulate)
            total += loss.detach().float() / r.accumulate
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), r.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return total, torch.as_tensor(norm, device=self.device).float()

    @torch.no_grad()
    def heldout_loss(self) -> float:
        """Mean loss over evenly spaced held-out windows, the same in every run, shared out over the processes."""
        count = min(self.recipe.heldout_windows, self.heldout.windows)
        chosen = [i * self.heldout.windows // count for i in range(count)]
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        model = self.plain.eval()
        size = max(1, self.recipe.batch // (self.recipe.accumulate * processes))
        own = chosen[rank::processes]
        for first in range(0, len(own), size):
            ids = self.heldout.take(own[first : first + size]).to(self.device)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            total += torch.stack((loss.double() * len(ids), torch.tensor(float(len(ids)), device=self.device)))
        summed, windows = self.accelerator.reduce(total, "sum").tolist()
        return summed / windows

    def gradient_row(self) -> Row:
        """The error of the head's gradients on held-out windows, on the model as it is now."""
        from cce_precision.analysis.train_gradient import head_gradient_errors

        count = min(self.heldout.windows, max(1, self.recipe.batch // self.recipe.accumulate))
        ids = self.heldout.take([i * self.heldout.windows // count for i in range(count)]).to(self.device)
        errors = head_gradient_errors(
            self.plain, ids, Method.parse(self.recipe.method), autocast=self.autocast, seed=self.step
        )
        return {"kind": "gradient", "step": self.step, **errors}

    # -- checkpoints --

    def save(self) -> None:
        """Writes checkpoint-STEP, whole or not at all, then removes the older ones."""
        part, final = self.out / f"part-{self.step}", self.out / f"checkpoint-{self.step}"
        if self.accelerator.is_main_process:
            shutil.rmtree(part, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(part))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            (part / "state.json").write_text(json.dumps({"step": self.step, "seconds": self.seconds}))
            shutil.rmtree(final, ignore_errors=True)
            part.rename(final)
            for old in self.out.glob("checkpoint-*"):
                if old != final:
                    shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def resume(self) -> None:
        """Goes on from the last checkpoint of the folder, where there is one."""
        found = sorted(self.out.glob("checkpoint-*"), key=lambda p: int(p.name.partition("-")[2]))
        if found:
            self.accelerator.load_state(str(found[-1]))
            state = json.loads((found[-1] / "state.json").read_text())
            self.step, self.seconds = state["step"], state["seconds"]
        if self.accelerator.is_main_process:
            _rewind(self.out, self.step if found else -1)
        self.accelerator.wait_for_everyone()

    # -- the loop --

    def emit(self, rows: list[Row]) -> None:
        """Appends lines to the curve, on the main process."""
        if not self.accelerator.is_main_process:
            return
        with (self.out / "curve.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        for row in rows:
            self.on_row(row)

    def flush(self, pending: list[tuple[Tensor, Tensor]], since: float) -> None:
        """Reads the losses of the steps since the last look and writes their lines."""
        if not pending:
            return
        losses = self.accelerator.reduce(torch.stack([loss for loss, _ in pending]), "mean").tolist()
        norms = torch.stack([norm for _, norm in pending]).tolist()  # waits for the device, so that the clock is right
        spent = time.perf_counter() - since
        self.seconds += spent
        tokens, first = self.recipe.batch * self.recipe.context, self.step - len(pending)
        shared = {
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(len(pending) * tokens / spent),
            "peak_mib": round(peak_mib(self.device), 1),
        }
        self.emit(
            [
                {"kind": "train", "step": first + i + 1, "loss": loss, "grad_norm": norm}
                | {"lr": self.recipe.rate(first + i), "tokens": (first + i + 1) * tokens, **shared}
                for i, (loss, norm) in enumerate(zip(losses, norms))
            ]
        )
        pending.clear()
        if not all(map(math.isfinite, losses)):
            raise FloatingPointError(f"the loss is {losses} before step {self.step}; lower the learning rate")

    def measure(self) -> None:
        """The lines beside the training loss that are due at this step."""
        r, end = self.recipe, self.step == self.recipe.steps
        due = lambda every: end or (every > 0 and self.step % every == 0)  # noqa: E731
        rows: list[Row] = []
        if due(r.heldout_every):
            rows.append({"kind": "heldout", "step": self.step, "loss": self.heldout_loss()})
        if r.gradient_every and due(r.gradient_every):
            rows.append(self.gradient_row())
        self.emit(rows)

    def loop(self, stopped: Callable[[], bool]) -> bool:
        """Trains to the end, or until `stopped` says so at a step's end; whether the end was reached."""
        r = self.recipe
        if self.step == 0:
            self.measure()
        pending: list[tuple[Tensor, Tensor]] = []
        since = time.perf_counter()
        while self.step < r.steps:
            pending.append(self.train_step())
            end, look = self.step == r.steps, self.step % r.log_every == 0
            measuring = end or any(n and self.step % n == 0 for n in (r.heldout_every, r.gradient_every))
            saving = bool(r.checkpoint_every) and self.step % r.checkpoint_every == 0
            halt = (look or self.accelerator.num_processes == 1) and self._agree(stopped())
            if look or measuring or saving or halt:
                self.flush(pending, since)
                if measuring:
                    self.measure()
                if saving or halt or end:
                    self.save()
                since = time.perf_counter()
            if halt and not end:
                return False
        return True

    def _agree(self, stop: bool) -> bool:
        """Whether any process was asked to stop."""
        if self.accelerator.num_processes == 1:
            return stop
        return bool(self.accelerator.reduce(torch.tensor(float(stop), device=self.device), "sum") > 0)


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or SIGTERM came: the step in progress ends first. A second one interrupts at once."""
    came: list[int] = []

    def note(number: int, frame: Any) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)

    try:
        before = {number: signal.signal(number, note) for number in STOPS}
    except ValueError:  # not the main thread: who started it stops it by `stopped`
        before = {}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def claim(asked: Row, out: Path) -> None:
    """Notes in recipe.json what the folder is a run of. Raises ValueError where it holds another run."""
    path = out / "recipe.json"
    if path.exists():
        held = json.loads(path.read_text())
        other = {k: (held.get(k), asked[k]) for k in asked if held.get(k) != asked[k]}
        if other:
            differs = "; ".join(f"{k} is {a!r} there, {b!r} here" for k, (a, b) in other.items())
            raise ValueError(f"{out} holds another run ({differs}); choose another folder, or --fresh to begin again")
    else:
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asked, indent=1) + "\n")


def _tokenizer(recipe: Recipe, tokens: Tokens) -> Any:
    """What turns text into the model's tokens, as transformers has it."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if recipe.model is not None and (Path(recipe.model) / "tokenizer.json").exists():
        return AutoTokenizer.from_pretrained(recipe.model, local_files_only=True)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokens.tokenizer))


def is_main() -> bool:
    """Whether this is the first of the processes that a launcher started."""
    return int(os.environ.get("RANK", "0")) == 0


@contextlib.contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    """PyTorch's deterministic algorithms, on or off, and then as they were."""
    switches = torch.utils.deterministic
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    filled, attention = switches.fill_uninitialized_memory, torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[attr-defined]
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what PyTorch demands of its products
        switches.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a check, and no matter of determinism
        torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass is not, whatever the line below says
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        switches.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
        torch.backends.cuda.enable_cudnn_sdp(attention)


def run(
    recipe: Recipe,
    tokens: Tokens,
    out: Path,
    *,
    device: str | None = None,
    on_row: Callable[[Row], None] = lambda row: None,
    stopped: Callable[[], bool] = lambda: False,
    keep_model: bool = True,
) -> Outcome:
    """Trains, or goes on with, the run of a folder; writes it as the module says.

    `stopped`: asked after each step; True stops the run as Ctrl-C does. `device`: "cpu" keeps it from the GPU.
    Raises ValueError where the recipe fits neither the folder nor the number of processes, FloatingPointError where
    the loss is no number.
    """
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    # Tied weights are left out of a checkpoint once and read back twice; nothing that a user could do about.
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    if is_main():
        claim(asdict(recipe) | {"tokens": tokens.digest, "torch": torch.__version__}, out)
    # The dtype is the recipe's affair, whatever the launcher's configuration says.
    accelerator = Accelerator(mixed_precision="no", cpu=device == "cpu")
    share = recipe.accumulate * accelerator.num_processes
    if recipe.batch % share:
        raise ValueError(
            f"batch is {recipe.batch}, it must be a multiple of accumulate x processes = "
            f"{recipe.accumulate} x {accelerator.num_processes}"
        )
    set_seed(recipe.seed)
    model = build(recipe.model, recipe.config, recipe.size, tokens.vocabulary, recipe.context, recipe.weights)
    prepare(model, Method.parse(recipe.method))
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    fused = accelerator.device.type == "cuda"
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=fused)
    if fused:
        torch.cuda.reset_peak_memory_stats(accelerator.device)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    # Processes draw their own samples; one alone draws as if it were the first.
    torch.manual_seed(recipe.seed + 7919 * accelerator.process_index)
    order = Order(tokens.training, recipe.context, recipe.batch, recipe.seed)
    heldout = Order(tokens.heldout, recipe.context, 1, 0)
    trainer = Trainer(recipe, out, order, heldout, accelerator, prepared, optimizer, on_row)
    trainer.resume()
    with _determinism(recipe.deterministic), stop_signals() as asked:
        finished = trainer.loop(lambda: asked() or stopped())
    if finished and keep_model:
        accelerator.wait_for_everyone()
        state = accelerator.get_state_dict(prepared)
        if accelerator.is_main_process:
            plain: Any = trainer.plain
            plain.save_pretrained(out / "model", state_dict=state)
            _tokenizer(recipe, tokens).save_pretrained(out / "model")
    accelerator.free_memory()
    return Outcome(finished, trainer.step, read_curve(out) if accelerator.is_main_process else [])
