"""Cases: heads that a cross-entropy meets, made from a seed at any shape, captured from a model, or read from a file.

    CASES["trained"](n=1024, v=32768, d=256, dtype=torch.bfloat16, seed=0, device="cpu") -> Case

A `Case` is a `Problem` with a name. Its values are exact in `dtype`; synthetic ones depend on the seed, the shape and
the kind of device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cce_precision.problem import Problem

if TYPE_CHECKING:
    from cce_precision.analysis.capture import Capture
    from cce_precision.analysis.heads import HeadStatistics

__all__ = ["CASES", "Case", "describe", "find", "from_file"]

BLOCK = 2**26  # logits held at a time
RANK_SHIFT = 2.7  # Zipf-Mandelbrot: frequency ~ (rank + shift)^-exponent
TRAINED_EXPONENT = 1.8
TRAINED_LEVEL = 8.0  # added to all logits
TRAINED_CONTEXT = 3.5  # standard deviation of the context's logits
BIAS_CARRIER = 0.5  # the entry of every e that carries the bias: a small one makes the mean classifier row long
LEAST_COMPLEMENT = 1e-8  # of `confident`


@dataclass(frozen=True)
class Case(Problem):
    """A problem with a name. `targets` holds -1 where a token is ignored."""

    name: str = ""
    stage: str = ""
    description: str = ""


Build = Callable[[int, int, int, torch.dtype, torch.Generator], Case]


@dataclass(frozen=True)
class Maker:
    """Makes a synthetic case of any shape from a seed."""

    build: Build

    def __call__(
        self,
        n: int = 1024,
        v: int = 32768,
        d: int = 256,
        dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> Case:
        return self.build(n, v, d, dtype, torch.Generator(device).manual_seed(seed))


# -- parts -------------------------------------------------------------------------------------------------------------


def _normal(shape: tuple[int, ...], scale: float, random: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=random, device=random.device).mul_(scale)


def _zipf(v: int, exponent: float, random: torch.Generator) -> Tensor:
    """(V,) fp32: log frequencies; the column is the rank."""
    return torch.arange(1, v + 1, device=random.device).add(RANK_SHIFT).log_().mul_(-exponent)


def _drawn(log_weight: Tensor, n: int, random: torch.Generator) -> Tensor:
    """(N,) columns drawn from softmax(log_weight); log_weight (1, V) for all tokens, or (N, V)."""
    cumulative = log_weight.softmax(1).cumsum(1)
    u = torch.rand(len(cumulative), n // len(cumulative), generator=random, device=random.device)
    columns = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)
    return columns.clamp_(max=cumulative.shape[1] - 1).reshape(-1)


def _unigram(n: int, v: int, random: torch.Generator) -> Tensor:
    """(N,) targets as frequent as words are, whatever the model says: common and rare classifier rows both occur."""
    return _drawn(_zipf(v, 1.0, random).unsqueeze(0), n, random)


def _logit_blocks(e: Tensor, c: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Token blocks with their logits (B, V) in fp32, at most `BLOCK` of them at a time."""
    step = max(1, BLOCK // len(c))
    wide = c.float()
    for start in range(0, len(e), step):
        rows = slice(start, start + step)
        yield rows, e[rows].float() @ wide.T


def _zipf_head(n: int, v: int, d: int, dtype: torch.dtype, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """e and c of `trained`. As in heads that have no bias, a direction in which every e is alike carries it."""
    e = _normal((n, d), 1.0, random)
    c = _normal((v, d), TRAINED_CONTEXT / math.sqrt(max(1, d - 1)), random)
    e[:, 0] = BIAS_CARRIER
    c[:, 0] = (_zipf(v, TRAINED_EXPONENT, random) + TRAINED_LEVEL) / BIAS_CARRIER
    return e.to(dtype), c.to(dtype)


def _model_targets(e: Tensor, c: Tensor, random: torch.Generator) -> Tensor:
    """(N,) each token's target drawn from its own softmax."""
    drawn = [_drawn(z, len(z), random) for _, z in _logit_blocks(e, c)]
    return torch.cat(drawn) if drawn else torch.zeros(0, dtype=torch.int64, device=e.device)


def _scale_for_odds(behind: Tensor, column: Tensor, odds: Tensor) -> Tensor:
    """(B,) m at which logsumexp over j != column of m behind_j is `odds`; behind (B, V) is at most 0.

    Newton's method from the left (Jensen's bound): the function is convex and falls with m.
    """
    others = behind.shape[1] - 1
    most = 16 * (math.log(others + 1) - math.log(LEAST_COMPLEMENT))  # for rows that nothing tells apart
    m = (odds - math.log(max(1, others))) * others / behind.sum(1)
    behind = behind.scatter(1, column, -torch.inf)
    for _ in range(6):
        m = m.nan_to_num(nan=0.0).clamp(0.0, most).unsqueeze(1)
        largest = behind.amax(1, keepdim=True)
        weight = torch.exp((behind - largest) * m).nan_to_num_(nan=0.0)
        total = weight.sum(1)
        slope = (weight * behind.clamp(min=-(2.0**20))).sum(1) / total
        m = m[:, 0] + (odds - total.log() - (largest * m)[:, 0]) / slope
    return m.nan_to_num(nan=0.0).clamp(0.0, most)


# -- the synthetic cases -----------------------------------------------------------------------------------------------


def init(n: int, v: int, d: int, dtype: torch.dtype, random: torch.Generator) -> Case:
    """A model at initialisation: normalised activations, classifier of standard deviation 0.02, Zipf targets."""
    e = _normal((n, d), 1.0, random).to(dtype)
    c = _normal((v, d), 0.02, random).to(dtype)
    return Case(e, c, _unigram(n, v, random), name="init", description="flat softmax of an untrained model")


def trained(n: int, v: int, d: int, dtype: torch.dtype, random: torch.Generator) -> Case:
    """A trained head: logits of Zipf bias plus Gaussian context, targets drawn from the model.

    The family keeps its statistics over V: mean loss about 2.3, some 90 entries a row above 2^-12, 2.5 % of the mass
    below it.
    """
    e, c = _zipf_head(n, v, d, dtype, random)
    targets = _model_targets(e, c, random)
    return Case(e, c, targets, name="trained", description="Zipf bias plus Gaussian context, targets from the model")


def confident(n: int, v: int, d: int, dtype: torch.dtype, random: torch.Generator) -> Case:
    """Rows that know their target: 1 - p_t log-uniform from 1/2 down to 1e-8, as far as D lets rows be told apart.

    e_i is a multiple of its target's classifier row.
    """
    c = torch.nn.functional.normalize(_normal((v, d), 1.0, random)).to(dtype)
    targets = torch.randint(v, (n,), generator=random, device=random.device)
    low, high = math.log(LEAST_COMPLEMENT), math.log(0.5)
    complement = torch.rand(n, generator=random, device=random.device).mul_(high - low).add_(low).exp_()
    odds = complement.log() - torch.log1p(-complement)
    e = c[targets].float()
    for rows, z in _logit_blocks(e, c):
        column = targets[rows].unsqueeze(1)
        behind = (z - z.gather(1, column)).clamp_(max=0.0)  # per unit of scale
        e[rows] *= _scale_for_odds(behind, column, odds[rows]).unsqueeze(1)
    return Case(e.to(dtype), c, targets, name="confident", description="1 - p_t log-uniform down to 1e-8")


def ties(n: int, v: int, d: int, dtype: torch.dtype, random: torch.Generator) -> Case:
    """Exact ties: each classifier row occurs four times, one token in eight has e = 0; Zipf targets.

    Entries are -1, 0, 1 (e) and -1/8, 0, 1/8 (c), so that logits are exact in fp32.
    """
    e = torch.randint(-1, 2, (n, d), generator=random, device=random.device).to(dtype)
    e[::8] = 0
    c = torch.randint(-1, 2, (-(-v // 4), d), generator=random, device=random.device).to(dtype).div_(8)
    c = c.repeat(4, 1)[:v]
    return Case(e, c, _unigram(n, v, random), name="ties", description="every classifier row four times")


def offset(n: int, v: int, d: int, dtype: torch.dtype, random: torch.Generator) -> Case:
    """The `trained` family with 1024 added to every logit, by a last direction in which e and c are 32."""
    e, c = _zipf_head(n, v, d, dtype, random)
    e[:, -1], c[:, -1] = 32, 32
    targets = _model_targets(e, c, random)
    return Case(e, c, targets, name="offset", description="trained, with a common logit offset of 1024")


# -- from files --------------------------------------------------------------------------------------------------------


def captured(
    n: int | None = None,
    v: int | None = None,
    d: int | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    stage: str = "trained",
) -> Case:
    """The head that comes with the library, at stage "initial", "early" or "trained".

    `n`: only its first n tokens; `dtype` None: as captured, else rounded to it. Raises ValueError for another v or d
    than the capture's, more tokens than it has, or an unknown stage. The seed plays no part.
    """
    from cce_precision.analysis.capture import load_shipped

    return _of_capture(load_shipped(stage), "captured", stage, n, (v, d), dtype, device)


def from_file(
    path: str | Path, n: int | None = None, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Case:
    """A head in a safetensors file, as `capture.load_capture` reads it; the case has the file's name."""
    from cce_precision.analysis.capture import load_capture

    head = load_capture(path)
    return _of_capture(head, Path(path).stem, head.metadata.get("stage", ""), n, (None, None), dtype, device)


def _of_capture(
    head: Capture,
    name: str,
    stage: str,
    n: int | None,
    shape: tuple[int | None, int | None],
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> Case:
    tokens, (v, d) = len(head.e), head.c.shape
    if shape[0] not in (None, v) or shape[1] not in (None, d):
        raise ValueError(f"case {name!r} has v={v} and d={d}, asked for v={shape[0]} and d={shape[1]}")
    if n is not None and n > tokens:
        raise ValueError(f"case {name!r} has {tokens} tokens, asked for n={n}")

    def moved(t: Tensor) -> Tensor:
        return t.to(device=device, dtype=dtype or t.dtype)

    return Case(
        e=moved(head.e[:n]),
        c=moved(head.c),
        targets=head.targets[:n].to(device).clamp(min=-1),  # -100 to -1
        bias=None if head.bias is None else moved(head.bias),
        softcap=head.softcap,
        name=name,
        stage=stage,
        description="captured head",
    )


CASES: dict[str, Callable[..., Case]] = {
    "init": Maker(init),
    "trained": Maker(trained),
    "confident": Maker(confident),
    "ties": Maker(ties),
    "offset": Maker(offset),
    "captured": captured,
}


def find(name: str) -> Callable[..., Case]:
    """The maker called `name`; ValueError listing the known ones."""
    if name not in CASES:
        raise ValueError(f"case {name!r} is not known; known: {', '.join(CASES)}")
    return CASES[name]


@torch.no_grad()
def describe(problem: Problem) -> HeadStatistics:
    """Loss, entropy, mean p_t, entries a row above 2^-12 and 2^-16, mass below them, surviving tiles; in fp32."""
    from cce_precision.analysis.heads import IGNORED, head_statistics

    targets = torch.where(problem.targets < 0, IGNORED, problem.targets)
    e = problem.e if problem.temperature == 1 else problem.e.float() / problem.temperature
    if problem.temperature != 1 and (problem.bias is not None or problem.softcap is not None):
        raise ValueError("a temperature beside a bias or a softcap is not described")
    return head_statistics(e, problem.c, targets, problem.bias, problem.softcap, dtype=torch.float32)
