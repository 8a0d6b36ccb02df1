"""Captured heads: the operands of a language model's last product, taken from a real model, saved, loaded, and
described.

A `Capture` holds e (N, D), c (V, D), targets (N,) and optionally bias (V,) and softcap. It comes from `capture(model,
batch)` for any causal language model, from `load_capture(file)`, or from `load_shipped(stage)`, which reads a head that
`pretrain.py` trained on real text. `head_statistics` measures what decides how a filtered softmax behaves on it.

    from cce_precision import analysis
    analysis.capture(model, batch).save("head.safetensors")

This file imports torch and safetensors only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

STAGES = ("initial", "early", "trained")
DATA = Path(__file__).resolve().parent / "data"
IGNORED = -100
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)


# -- the record and its file -------------------------------------------------------------------------------------------


def _check(name: str, tensor: Tensor, rank: int, dtypes: tuple[torch.dtype, ...], where: str) -> None:
    if tensor.ndim != rank:
        shape = {"e": "(N, D)", "c": "(V, D)", "targets": "(N,)", "bias": "(V,)"}[name]
        raise ValueError(f"{where}: tensor {name!r} has shape {tuple(tensor.shape)}, expected {shape}")
    if tensor.dtype not in dtypes:
        raise ValueError(
            f"{where}: tensor {name!r} has dtype {tensor.dtype}, allowed are {', '.join(str(d) for d in dtypes)}"
        )
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{where}: tensor {name!r} holds NaN or infinite values, only finite ones are allowed")


@dataclass(frozen=True)
class Capture:
    """The operands of one linear cross-entropy; logits are softcap * tanh((e c^T + bias) / softcap).

    e (N, D) and c (V, D): float32, float16 or bfloat16. targets (N,): int64 in [0, V) or -100 (ignored). bias (V,):
    float or None. softcap: a positive number or None. metadata: strings, kept in the file. Raises ValueError naming the
    tensor and what is allowed.
    """

    e: Tensor
    c: Tensor
    targets: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._validate("capture")

    def _validate(self, where: str) -> None:
        _check("e", self.e, 2, FLOATS, where)
        _check("c", self.c, 2, FLOATS, where)
        _check("targets", self.targets, 1, (torch.int64,), where)
        (n, d), (v, dc) = self.e.shape, self.c.shape
        if d != dc:
            raise ValueError(f"{where}: tensor 'e' has width {d}, tensor 'c' has width {dc}; both are the head's D")
        if len(self.targets) != n:
            raise ValueError(
                f"{where}: tensor 'targets' has {len(self.targets)} entries, tensor 'e' has {n} rows; both are N"
            )
        wrong = (self.targets != IGNORED) & ((self.targets < 0) | (self.targets >= v))
        if bool(wrong.any()):
            raise ValueError(
                f"{where}: tensor 'targets' holds {int(self.targets[wrong][0])}, allowed are 0 to {v - 1} and {IGNORED}"
            )
        if self.bias is not None:
            _check("bias", self.bias, 1, FLOATS, where)
            if len(self.bias) != v:
                raise ValueError(
                    f"{where}: tensor 'bias' has {len(self.bias)} entries, tensor 'c' has {v} rows; both are V"
                )
        if self.softcap is not None and not (math.isfinite(self.softcap) and self.softcap > 0):
            raise ValueError(f"{where}: softcap is {self.softcap}, expected a positive finite number")

    def to(self, *args: Any, **kwargs: Any) -> Capture:
        """The same capture with e, c and bias converted as by `Tensor.to`; targets follow the device alone."""
        e, c = self.e.to(*args, **kwargs), self.c.to(*args, **kwargs)
        bias = None if self.bias is None else self.bias.to(*args, **kwargs)
        return Capture(e, c, self.targets.to(e.device), bias, self.softcap, self.metadata)

    def save(self, path: str | Path, *, compact: bool = False) -> None:
        """Writes a safetensors file; `compact` stores c as int8 with a float32 scale a row, e in bfloat16, targets in
        int32.

        What a compact file holds is a case of its own, `as_compact(self)`.
        """
        tensors = {"e": self.e, "c": self.c, "targets": self.targets}
        if compact:
            codes, scale = quantise_rows(self.c)
            tensors = {"e": self.e.bfloat16(), "c_int8": codes, "c_scale": scale, "targets": self.targets.int()}
        if self.bias is not None:
            tensors["bias"] = self.bias
        if self.softcap is not None:
            tensors["softcap"] = torch.tensor(self.softcap, dtype=torch.float64)
        save_file(
            {k: t.detach().cpu().contiguous() for k, t in tensors.items()}, path, {"format": "pt", **self.metadata}
        )


def as_compact(capture: Capture) -> Capture:
    """What `load_capture` gives back after `capture.save(path, compact=True)`: bfloat16, c by way of int8."""
    c = dequantise_rows(*quantise_rows(capture.c))
    return Capture(capture.e.bfloat16(), c, capture.targets, capture.bias, capture.softcap, capture.metadata)


def quantise_rows(c: Tensor) -> tuple[Tensor, Tensor]:
    """c (V, D) as int8 (V, D) in [-127, 127] and float32 scales (V,): c is about codes * scale, to half a scale."""
    c = c.float()
    scale = c.abs().amax(dim=1) / 127
    scale[scale == 0] = 1
    return torch.round(c / scale[:, None]).to(torch.int8), scale


def dequantise_rows(codes: Tensor, scale: Tensor) -> Tensor:
    """codes * scale in float32, then rounded to bfloat16: two roundings, so the same bits on every machine."""
    return (codes.float() * scale[:, None]).bfloat16()


def _read_classifier(tensors: dict[str, Tensor], path: Path) -> None:
    """Replaces the compact pair c_int8, c_scale by c."""
    codes, scale = tensors.pop("c_int8"), tensors.pop("c_scale", None)
    if "c" in tensors:
        raise ValueError(f"{path}: holds both 'c' and 'c_int8', only one of them is allowed")
    if codes.ndim != 2 or codes.dtype != torch.int8:
        raise ValueError(f"{path}: tensor 'c_int8' is {codes.dtype} {tuple(codes.shape)}, expected torch.int8 (V, D)")
    if scale is None or scale.shape != codes.shape[:1] or scale.dtype != torch.float32:
        found = "missing" if scale is None else f"{scale.dtype} {tuple(scale.shape)}"
        raise ValueError(
            f"{path}: tensor 'c_scale' is {found}, expected torch.float32 ({len(codes)},), one scale a row of 'c_int8'"
        )
    tensors["c"] = dequantise_rows(codes, scale)


def load_capture(path: str | Path, device: str | torch.device = "cpu") -> Capture:
    """Reads a captured head: safetensors with e (N, D), c (V, D), targets (N,), and optionally bias (V,) and softcap.

    e, c, bias: float32, float16 or bfloat16. targets: any integer dtype. softcap: a tensor of one number or an entry of
    the file's metadata. Instead of c: c_int8 (V, D) with c_scale (V,), float32, which are dequantised to bfloat16.
    Raises FileNotFoundError, or ValueError naming the file, the tensor and what is allowed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
    metadata.pop("format", None)
    if "c_int8" in tensors:
        _read_classifier(tensors, path)
    for name in ("e", "c", "targets"):
        if name not in tensors:
            present = ", ".join(sorted(tensors)) or "nothing"
            raise ValueError(
                f"{path}: tensor {name!r} is missing; needed are e (N, D), c (V, D), targets (N,), present: {present}"
            )
    if extra := sorted(set(tensors) - {"e", "c", "targets", "bias", "softcap"}):
        raise ValueError(
            f"{path}: tensor {extra[0]!r} is not known; allowed are e, c (or c_int8, c_scale), targets, bias, softcap"
        )
    if tensors["targets"].dtype not in INTEGERS:
        raise ValueError(
            f"{path}: tensor 'targets' has dtype {tensors['targets'].dtype}, "
            f"allowed are {', '.join(str(d) for d in INTEGERS)}"
        )
    capture = object.__new__(Capture)  # validated below, with the file's name in the message
    values = (
        tensors["e"],
        tensors["c"],
        tensors["targets"].long(),
        tensors.get("bias"),
        _read_softcap(tensors, metadata, path),
        metadata,
    )
    for slot, value in zip(fields(Capture), values, strict=True):
        object.__setattr__(capture, slot.name, value)
    capture._validate(str(path))
    return capture


def _read_softcap(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> float | None:
    stored = tensors.get("softcap")
    if stored is not None:
        if stored.numel() != 1:
            raise ValueError(f"{path}: tensor 'softcap' has shape {tuple(stored.shape)}, expected one number")
        return float(stored)
    text = metadata.pop("softcap", None)
    try:
        return None if text is None else float(text)
    except ValueError:
        raise ValueError(f"{path}: metadata entry 'softcap' is {text!r}, expected a number") from None


def load_shipped(stage: str = "trained", device: str | torch.device = "cpu") -> Capture:
    """The captured head that comes with the library, at "initial", "early" (10 % trained) or "trained".

    e bfloat16 (1024, 128), c bfloat16 (8192, 128) dequantised from int8: those values are the case, exactly. See
    data/README.md.
    """
    if stage not in STAGES:
        raise ValueError(f"stage is {stage!r}, known are {', '.join(STAGES)}")
    return load_capture(DATA / f"captured-{stage}.safetensors", device)


# -- from a model ------------------------------------------------------------------------------------------------------


def _find_head(model: nn.Module, head: str | None) -> nn.Module:
    if head is not None:
        found = dict(model.named_modules()).get(head)
        if found is None:
            linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
            raise ValueError(
                f"head is {head!r}, not a module of the model; its linear modules: {', '.join(linears[-8:]) or 'none'}"
            )
    else:
        get = getattr(model, "get_output_embeddings", None)
        found = get() if callable(get) else None
        if found is None:
            raise ValueError(f"{type(model).__name__} does not say which module is its head; name it with head=")
    weight = getattr(found, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.dtype not in FLOATS:
        raise ValueError(
            f"the head {type(found).__name__} has no float weight (V, D) to capture; expected a linear module"
        )
    return found


def _config_value(model: nn.Module, *names: str) -> float | None:
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", None)
    config = text() if callable(text) else config
    values = (getattr(config, name, None) for name in names)
    return next((float(value) for value in values if isinstance(value, (int, float))), None)


def _logits_of(output: Any, vocabulary: int) -> Tensor | None:
    """The logits inside whatever a model returned, or None."""
    if isinstance(output, Tensor):
        return output if output.shape[-1:] == (vocabulary,) else None
    if isinstance(output, Mapping):
        output = output.get("logits")
        return _logits_of(output, vocabulary)
    if isinstance(output, (tuple, list)):
        return next((found for item in output if (found := _logits_of(item, vocabulary)) is not None), None)
    return _logits_of(getattr(output, "logits", None), vocabulary)


def _split_batch(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    """Positional inputs, keyword inputs (without labels, so that the model returns logits) and labels."""
    if isinstance(batch, Tensor):
        return (batch,), {}, batch
    if isinstance(batch, Mapping):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        labels = batch["labels"] if "labels" in batch else batch.get("input_ids")
        if labels is None:
            raise ValueError(f"batch has neither 'labels' nor 'input_ids', it has: {', '.join(map(str, batch))}")
        mask = batch.get("attention_mask")
        if mask is not None and mask.shape == labels.shape:
            labels = labels.masked_fill(mask == 0, IGNORED)
        return (), inputs, labels
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return (batch[0],), {}, batch[1]
    raise ValueError(
        f"batch is a {type(batch).__name__}, allowed are token ids, a pair (inputs, labels), a mapping of keywords"
    )


@torch.no_grad()
def capture(
    model: nn.Module,
    batch: Any,
    *,
    head: str | None = None,
    shift: bool = True,
    softcap: float | None = None,
    logit_scale: float | None = None,
) -> Capture:
    """Runs a causal language model once, in evaluation mode, and captures what its head sees.

    batch: token ids (B, T), a pair (inputs, labels), or a mapping of the model's keywords; labels default to the token
    ids, and positions whose attention mask is 0 or whose label is -100 are dropped. `shift`: the label of position t is
    token t + 1 (False: labels are aligned already). `head`: the head module's name, by default what
    `get_output_embeddings()` returns. `softcap`, `logit_scale`: by default what the model's config says; the scale is
    folded into c and bias.

    The result is compared with the logits that the model itself returned. Raises ValueError when they differ, that is,
    when the model does something to its logits which e, c, bias and softcap cannot express.
    """
    module = _find_head(model, head)
    softcap = softcap if softcap is not None else _config_value(model, "final_logit_softcapping", "logits_soft_cap")
    if logit_scale is None:
        divisor = _config_value(model, "logits_scaling")
        logit_scale = _config_value(model, "logit_scale") if divisor is None else 1 / divisor
    args, kwargs, labels = _split_batch(batch)
    seen: list[Tensor] = []
    hook = module.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].detach()))
    training = model.training
    try:
        output = model.eval()(*args, **kwargs)
    finally:
        model.train(training)
        hook.remove()
    if len(seen) != 1:
        raise ValueError(
            f"the head was called {len(seen)} times in one pass, expected once; undo patches that fuse head and loss"
        )
    e, bias = seen[0], getattr(module, "bias", None)
    if e.shape[:-1] != labels.shape:
        raise ValueError(
            f"the head saw rows of shape {tuple(e.shape[:-1])}, the labels have {tuple(labels.shape)}; both must agree"
        )
    c = module.get_parameter("weight").detach().clone()
    bias = None if bias is None else bias.detach().clone()
    metadata = {"model": type(model).__name__}
    if logit_scale is not None and logit_scale != 1:
        exact = math.frexp(logit_scale)[0] == 0.5  # a power of two scales every dtype exactly
        c = c * logit_scale if exact else c.float() * logit_scale
        bias = None if bias is None else bias.float() * logit_scale
        metadata["logit_scale"] = f"{logit_scale!r}, folded into c and bias"
    logits = _logits_of(output, len(c))
    metadata["checked"] = "no: the model returned no logits"
    if logits is not None and logits.shape[:-1] == e.shape[:-1]:
        _compare_logits(logits.flatten(0, -2), e.flatten(0, -2), c, bias, softcap)
        metadata["checked"] = "against the model's own logits"
    if shift:
        e, labels = e[..., :-1, :], labels[..., 1:]
    rows, targets = e.flatten(0, -2), labels.flatten().to(e.device).long()
    kept = targets != IGNORED
    return Capture(rows[kept].clone(), c, targets[kept], bias, softcap, metadata)


def _compare_logits(logits: Tensor, e: Tensor, c: Tensor, bias: Tensor | None, softcap: float | None) -> None:
    """ValueError unless up to 64 rows of logits agree with e, c, bias, softcap, to the rounding of their dtypes."""
    rows = torch.linspace(0, len(e) - 1, min(64, len(e)), device=e.device).long()
    found, e = logits[rows].float(), e[rows].float()
    expected, size = e @ c.float().T, e.abs() @ c.float().abs().T
    if bias is not None:
        expected, size = expected + bias.float(), size + bias.float().abs()
    if softcap is not None:
        expected = softcap * torch.tanh(expected / softcap)
    precision = max(torch.finfo(t.dtype).eps for t in (logits, c))
    autocast = torch.finfo(torch.bfloat16).eps if torch.is_autocast_enabled(logits.device.type) else 0.0
    if bool(((found - expected).abs() <= 4 * max(precision, autocast) * size + 1e-6).all()):
        return
    ratio = float((found * expected).sum() / (expected * expected).sum().clamp_min(1e-30))
    raise ValueError(
        f"the model's logits are not what its head, bias, softcap={softcap} and logit scale give (they are about "
        f"{ratio:.4g} times as large); give softcap= or logit_scale= if the model applies one, "
        "otherwise this head cannot be captured"
    )
