"""Time, memory and loss of whole training steps: a Llama-like model as transformers has it, with our patch and with
Liger's.

    python -m cce_precision.analysis.step_bench --out reports/steps

Every method trains a copy of one model on the same batches, all in turn at every step, so that a change of the GPU's
clock meets them alike. A step is forward, backward, AdamW and the reset of the gradients; its peak is what the method
would need if it were alone: the largest memory during its step less what the other copies hold.

The text is synthetic: tokens follow Zipf's law, and every other one is a fixed function of its predecessor, so that
there is something to learn. Liger's methods are left out, with the reason, where its package is missing or refuses.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cce_precision.huggingface import cce_counts, cce_patch

__all__ = ["METHODS", "batches", "main", "page", "run"]

MIB = 2**20
WARM = 5  # steps that are not timed: compilation, allocation


def _liger(model: nn.Module, **kernels: bool) -> None:
    from liger_kernel.transformers import apply_liger_kernel_to_llama  # type: ignore[import-not-found]

    chosen = {"rms_norm": False, "swiglu": False, "fused_linear_cross_entropy": False} | kernels
    # Its rotary embedding replaces a function of the module, that is of every model: left out for all.
    apply_liger_kernel_to_llama(rope=False, cross_entropy=False, model=model, **chosen)
    for name, value in (("pretraining_tp", 1), ("use_return_dict", True)):  # read by Liger, gone from transformers
        if not hasattr(model.config, name):
            setattr(model.config, name, value)


def _liger_and_patch(model: nn.Module, **options: Any) -> None:
    _liger(model, rms_norm=True, swiglu=True)
    cce_patch(model, **options)


def _ours(megabytes: int | None, beside_liger: bool) -> tuple[str, Callable[[nn.Module], Any]]:
    """What it is, and how it is put into a model: our patch with a workspace, with Liger's other kernels or without."""
    options: dict[str, Any] = {} if megabytes is None else {"workspace_mb": megabytes}
    call = f"`cce_patch(model{''.join(f', {name}={value}' for name, value in options.items())})`"
    if beside_liger:
        return f"Liger's RMSNorm and SwiGLU, then {call}", lambda model: _liger_and_patch(model, **options)
    return call, lambda model: cce_patch(model, **options)


OTHERS: dict[str, tuple[str, Callable[[nn.Module], Any]]] = {
    "unpatched": ("transformers as it is", lambda model: None),
    "liger-loss": ("Liger's fused loss alone", lambda model: _liger(model, fused_linear_cross_entropy=True)),
    "liger": (
        "Liger's loss, RMSNorm and SwiGLU",
        lambda model: _liger(model, fused_linear_cross_entropy=True, rms_norm=True, swiglu=True),
    ),
}
METHODS = (
    "unpatched", "cce_exact", "cce_exact@2200MB", "cce_exact@64MB", "cce_exact@32MB", "liger-loss", "liger",
    "liger+cce_exact", "liger+cce_exact@64MB", "liger+cce_exact@32MB",
)  # fmt: skip


def method_of(name: str) -> tuple[str, Callable[[nn.Module], Any]]:
    """What a method is, and what it does to a model: one of `OTHERS`, or [liger+]cce_exact[@<MiB>MB].

    Raises ValueError for another name.
    """
    if name in OTHERS:
        return OTHERS[name]
    found = re.fullmatch(r"(liger\+)?cce_exact(?:@([1-9]\d*)MB)?", name)
    if found is None:
        raise ValueError(f"{name!r} is no method; known: {', '.join(OTHERS)}, [liger+]cce_exact[@<MiB>MB]")
    return _ours(None if found[2] is None else int(found[2]), found[1] is not None)


def batches(vocabulary: int, shape: tuple[int, int], seed: int = 0) -> Iterator[Tensor]:
    """(B, T) int64 tokens without end, the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.arange(1, vocabulary + 1, dtype=torch.float64).reciprocal()
    order = torch.randperm(vocabulary, generator=generator)
    successor = torch.randperm(vocabulary, generator=generator)
    cumulative = weights.cumsum(0) / weights.sum()
    while True:
        drawn = torch.rand(shape, dtype=torch.float64, generator=generator)
        tokens = order[torch.searchsorted(cumulative, drawn).clamp(max=vocabulary - 1)]
        tokens[:, 1::2] = successor[tokens[:, : shape[1] // 2 * 2 : 2]]
        yield tokens


def model_of(vocabulary: int, hidden: int, layers: int, length: int) -> nn.Module:
    """A Llama-like model with tied embeddings, from the seed 0."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(hidden // 64, 1)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=length,
        tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


class Runner:
    """One method: its copy of the model, its optimizer, and what its steps gave."""

    def __init__(self, name: str, model: nn.Module) -> None:
        self.name = name
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=next(model.parameters()).is_cuda)
        self.losses: list[float] = []
        self.times: list[float] = []
        self.peaks: list[float] = []

    def own(self) -> int:
        """Bytes that stay between steps."""
        state = [x for s in self.optimizer.state.values() for x in s.values() if isinstance(x, Tensor)]
        return sum(x.numel() * x.element_size() for x in (*self.model.parameters(), *self.model.buffers(), *state))

    def step(self, tokens: Tensor) -> None:
        cuda = tokens.is_cuda
        if cuda:
            torch.cuda.synchronize()
            others = torch.cuda.memory_allocated() - self.own()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        loss = self.model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize()
            self.peaks.append((torch.cuda.max_memory_allocated() - others) / MIB)
        self.times.append(1000 * (time.perf_counter() - began))
        self.losses.append(loss.item())


def prepare(model: nn.Module, methods: list[str], tokens: Tensor) -> tuple[list[Runner], dict[str, str]]:
    """A runner for each method that takes one trial step, and why the others do not."""
    runners, refused = [], {}
    for name in methods:
        try:
            trial = copy.deepcopy(model)
            method_of(name)[1](trial)
            trial.train()(input_ids=tokens[:1, :64], labels=tokens[:1, :64]).loss.backward()
            trial.zero_grad(set_to_none=True)
        except Exception as error:  # a peer may miss or fail in any way; it is said in the rows
            refused[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            print(f"{name}: left out, {refused[name]}", flush=True)
            continue
        runners.append(Runner(name, trial))
    return runners, refused


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows: one that describes the run, then one a method."""
    device = torch.device(options.device)
    source = batches(options.vocabulary, (options.batch, options.length))
    model = model_of(options.vocabulary, options.hidden, options.layers, options.length)
    model = model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    runners, refused = prepare(model, options.methods, next(source).to(device))
    for step in range(options.steps):
        tokens = next(source).to(device)
        turn = step % len(runners)
        for runner in (*runners[turn:], *runners[:turn]):
            runner.step(tokens)
        if step % 10 == 9 or step + 1 == options.steps:
            print(f"step {step + 1}: " + ", ".join(f"{r.name} {r.times[-1]:.1f} ms" for r in runners), flush=True)
    head = {
        "kind": "run",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "command": "python -m cce_precision.analysis.step_bench " + " ".join(sys.argv[1:]),
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": options.batch * options.length,
        "shape": {key: getattr(options, key) for key in ("vocabulary", "hidden", "layers", "batch", "length", "steps")},
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "refused": refused,
        "versions": {name: _version(name) for name in ("torch", "triton", "transformers", "liger-kernel")},
    }
    return [head] + [
        {
            "kind": "method",
            "method": r.name,
            "losses": r.losses,
            "ms": r.times,
            "peak_mib": r.peaks,
            "fused": cce_counts(r.model).fused if "cce" in r.name else None,
        }
        for r in runners
    ]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def page(rows: list[dict[str, Any]]) -> str:
    """README.md of the rows."""
    head, methods = rows[0], rows[1:]
    base = next((m for m in methods if m["method"] == "unpatched"), methods[0])
    shape = head["shape"]
    versions = ", ".join(f"{name} {version}" for name, version in head["versions"].items() if version)
    lines = [
        "# A training step of a whole model",
        "",
        f"{head['parameters'] / 1e6:.0f} M parameters (a tied Llama of transformers), width {shape['hidden']},",
        f"{shape['layers']} layers, V = {shape['vocabulary']}, {head['tokens']:,} tokens a step, {head['dtype']}, "
        f"AdamW; {head['device']}; {versions}. All methods in turn at every step of one run, on the same batches;",
        f"medians over {len(base['ms']) - _warm(base)} steps. The peak is what the method would need alone.",
        "",
        f"    {head['command']}",
        "",
        "| method | what | step ms (median) | lowest | peak MiB | last loss | largest difference of a loss from "
        f"{base['method']} |",
        "|---|---|---|---|---|---|---|",
    ]
    for m in methods:
        times = m["ms"][_warm(m) :]
        peak = f"{max(m['peak_mib']):,.0f}" if m["peak_mib"] else "-"
        away = max(abs(a - b) for a, b in zip(m["losses"], base["losses"]))
        lines.append(
            f"| {m['method']} | {method_of(m['method'])[0]} | {statistics.median(times):.2f} | {min(times):.2f} "
            f"| {peak} | {m['losses'][-1]:.4f} | {away:.4f} |"
        )
    for name, reason in head["refused"].items():
        lines.append(f"| {name} | {method_of(name)[0]} | left out: {reason} | | | | |")
    lines += ["", "Losses:", "", "| step | " + " | ".join(m["method"] for m in methods) + " |"]
    lines.append("|---" * (len(methods) + 1) + "|")
    steps = len(base["losses"])
    for step in sorted({0, *range(4, steps, 5), steps - 1}):
        lines.append(f"| {step + 1} | " + " | ".join(f"{m['losses'][step]:.4f}" for m in methods) + " |")
    return "\n".join(lines) + "\n"


def _warm(row: dict[str, Any]) -> int:
    return WARM if len(row["ms"]) > 2 * WARM else 0


def _methods(text: str) -> list[str]:
    chosen = [name.strip() for name in text.split(",") if name.strip()]
    for name in chosen:
        try:
            method_of(name)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return chosen


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m cce_precision.analysis.step_bench", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--methods", type=_methods, default=list(METHODS), help="names, separated by commas")
    for name, value in (("vocabulary", 131072), ("hidden", 512), ("layers", 10), ("batch", 8), ("length", 2048)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("reports/steps"), help="folder for rows.jsonl and README.md")
    parser.add_argument("--page-only", action="store_true", help="draw README.md from rows.jsonl")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    rows_path = options.out / "rows.jsonl"
    if not options.page_only:
        rows_path.write_text("".join(json.dumps(row) + "\n" for row in run(options)))
    rows = [json.loads(line) for line in rows_path.read_text().splitlines()]
    (options.out / "README.md").write_text(page(rows))
    print(page(rows))


if __name__ == "__main__":
    main()
