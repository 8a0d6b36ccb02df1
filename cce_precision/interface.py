"""`linear_cross_entropy` and `LinearCrossEntropy`: validate once, flatten, dispatch, compose."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import choosing, validation
from .autograd import choose_backend, forward_of, occupancy_of, statistics_of
from .dtensor import place
from .eager import plain_heads
from .migration import suggests, unknown_keyword
from .numerics import Path, Variant
from .parallel import VocabParallelOptions, check_options, check_shares, common_seed, heads_of_shares
from .problem import Heads, Plan, Problem
from .variants import DEFAULT, get

__all__ = [
    "FilterStatistics",
    "LinearCrossEntropy",
    "LinearCrossEntropyOutput",
    "compute_z_loss",
    "linear_cross_entropy",
]

IGNORE_INDEX = -100


class FilterStatistics(NamedTuple):
    """What the filter did to each token of a call, and how far it can have moved the gradient of e; shapes as the
    unreduced loss."""

    kept_mass: (
        Tensor  # sum_j P^_j, the probability that enters dE, the target's included; 1 without a filter, 0 where ignored
    )
    hits: Tensor  # int64, entries of the softmax row that enter dE
    path: str  # "plain", "compiled", "eager" or "triton": what computed the call
    certificate: (
        Tensor  # upper bound of ||dE_i - exact dE_i|| / |upstream of nll_i| that the filter alone causes; 0 without one
    )
    # Of a sparse backward pass on the kernels: in how many blocks of 16 columns, over all tokens, the filter may keep
    # an entry (0-dim int64; capacity + 1 where more), and how many fit in the workspace: with more the gradient is the
    # exact one. Else None.
    blocks: Tensor | None = None
    capacity: int | None = None
    tolerance: float | None = None  # what the filter's relative error of the gradients was promised to stay below


class LinearCrossEntropyOutput(NamedTuple):
    """What a call with a return_* flag beyond return_lse gives; None for what was not asked for."""

    loss: Tensor
    lse: Tensor | None = None
    entropy: Tensor | None = None
    argmax: Tensor | None = None
    stats: FilterStatistics | None = None
    impl: str = ""  # the variant's name: what impl="auto" took


@suggests
def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool | int = 0,
    return_lse: bool = False,
    filter_eps: float | str | None = "auto",
    accum_e_fp32: bool = False,
    accum_c_fp32: bool = False,
    filter_e_grad: bool = True,
    filter_c_grad: bool = True,
    impl: str | Variant = DEFAULT,
    vocab_parallel_options: VocabParallelOptions | None = None,
    *,
    backend: str = "auto",
    tolerance: float | None = None,
    workspace_mb: int | None = None,
    seed: int | None = None,
    validate: bool | str = "auto",
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    temperature: float = 1.0,
    return_entropy: bool = False,
    return_argmax: bool = False,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, Tensor] | LinearCrossEntropyOutput:
    """The cross-entropy of z = softcap(e c^T + bias) / temperature against `targets`, without the logits in memory.

    Args:
        e: (..., D) embeddings, fp16, bf16, fp32 or fp64; any strides. Under autocast, e, c and bias are cast as by
            `F.linear`.
        c: (V, D) classifier; may differ from e in dtype, products then see the common dtype.
        targets: (...) integer class indices in [0, V), or `ignore_index`, whose tokens count nowhere, whatever e holds
            there.
        bias: (V,) added to the logits before the softcap; -inf masks a class.
        softcap: s > 0 for z = s tanh(y / s); None for none.
        reduction: "mean" (over the tokens that count, by class weight as `F.cross_entropy`), "sum" or "none".
        shift: k pairs e[..., i, :] with targets[..., i + k] for causal models, without copying e; True is 1. An
            unreduced loss then has shape (..., T - k).
        return_lse: also return the log-sum-exp of each token, differentiable, 0 where ignored: (loss, lse).
        filter_eps: probability below which a filtering variant skips; "auto" is finfo(dtype).eps / 32; None filters
        nothing and flushes nothing. accum_e_fp32, accum_c_fp32: sum that gradient in fp32 whatever the variant says.
        filter_e_grad, filter_c_grad: False leaves that gradient unfiltered.
        impl: a variant's name or alias (`cce-precision variants` lists them), or a `Variant` record. "auto": the
            fastest by a committed table of measurements that meets `tolerance` in `workspace_mb`; it depends on shapes,
            dtype, device and options alone, and never synchronises (`choosing`).
        vocab_parallel_options: c (and bias) are this process's rows of a classifier that processes share; e, targets
            and class_weight (of the whole vocabulary) are the same on all of them; see `VocabParallelOptions`. DTensors
            need none: their placements say who holds what; see `cce_precision.dtensor`.
        backend: "triton" demands the kernels, "eager" plain PyTorch, "auto" takes the kernels where they can run.
        tolerance: the largest relative error of dE and dC (Frobenius norms). With impl="auto": as predicted for the
            variant; None is no less exact than `baseline`, PyTorch's own loss in this dtype. With cce_sparse,
            cce_unbiased and cce_subsampled: of their filter (the root of the mean square over its draws), beside the
            rounding errors of cce_exact; where the pass cannot promise it (`promise.filter_error`) its gradient is the
            exact one, decided on the device. Others raise.
        workspace_mb: most MiB of scratch for blocks of logits; None is the backend's default (256 for impl="auto").
            Where it holds them, cce_exact in bf16 keeps softmax powers and takes three products instead of four (mean
            or sum of a plain loss): 2 N V bytes beside the gradients with fewer than 2 D tokens, else sums of 4 V D
            bytes and 1,024 tokens' powers at least; on Hopper it is fastest where the powers of all tokens fit.
            Where it does not hold the fp32 sums of dE, 4 N D bytes, a variant without a filter computes the logits
            once more: dE by chunks of tokens in the memory of dC, then dC. dE, of 2 N D bytes in 16 bits, and a piece
            of 256 tokens and columns are the least that it takes.
        seed: for variants that sample; None draws one from PyTorch's generator, so `torch.manual_seed` reproduces a
            run.
        validate: whether to check the range of targets: True, False, or "auto" (only where it costs no
            synchronisation).
        label_smoothing: in [0, 1], as `F.cross_entropy`.
        class_weight: (V,) weights, as `weight` of `F.cross_entropy`; not differentiated.
        temperature: > 0, divides the logits after the softcap.
        return_entropy: also return the entropy of each token's softmax in nats, differentiable.
        return_argmax: also return the largest logit's index, int64, the lowest among equals; 0 where ignored.
        return_stats: also return `FilterStatistics`, at the cost of one more pass over the logits.

    Returns:
        The loss, fp32 (fp64 for fp64 inputs), a scalar or for reduction "none" a tensor of the targets' shape, 0 where
        ignored. With return_lse alone (loss, lse); with any of return_entropy, return_argmax or return_stats a
        `LinearCrossEntropyOutput`. The mean over no token is NaN, as in PyTorch, with zero gradients. NaN and inf stay
        in their token's row (and in dC).

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
        NotImplementedError: on differentiating a gradient again.

    Error guarantee: `cce_precision.analysis.bounds` evaluates a rigorous bound for each variant; the loss is formed in
    fp32 as log1p of the odds against the target, accurate to a few ulp beyond the error of the logits themselves.

    Sources: Wijmans et al., arXiv 2411.09009 (the method); Blanchard, Higham and Higham, doi 10.1093/imanum/draa038
        (lse).
    """
    named = None if impl == choosing.AUTO else get(impl)
    options = validation.Options(
        ignore_index, softcap, reduction, shift, filter_eps, backend, tolerance, workspace_mb, seed, validate,
        label_smoothing, temperature,
    )  # fmt: skip
    validation.check_options(options)
    configuration = (filter_eps, accum_e_fp32, accum_c_fp32, filter_e_grad, filter_c_grad)
    variant = None if named is None else named.configure(*configuration)
    validation.check_tolerance(tolerance, variant, return_entropy)
    placed = place(e, c, targets, bias, class_weight, check_options(vocab_parallel_options))
    validation.check_tensors(e, placed.c, placed.targets, placed.bias, placed.class_weight, options, placed.options)
    e, c, targets, bias, class_weight, share, tokens = placed
    whole = share is None and tokens is None
    validation.check_whole(whole, return_stats, tolerance)
    e, c, bias = _autocast(e, c, bias)
    one_pass = reduction != "none" and class_weight is None and not (label_smoothing or return_lse or return_entropy)
    if variant is None:
        plain = one_pass and bias is None and softcap is None and temperature == 1 and not return_argmax
        wanted = choosing.Options(tolerance, workspace_mb, plain and whole, *configuration)
        found, workspace_mb = _automatic(e, c, backend, wanted, not whole)
        variant = found.configure(*configuration)
    offset = int(shift)
    flat_targets = _flatten_targets(targets, ignore_index, offset)
    check = validation.should_check_range(options, targets)
    if check and share is None:
        validation.check_range(targets[..., offset:], ignore_index, c.shape[0])

    plan = Plan(
        variant,
        None if softcap is None else float(softcap),
        float(temperature),
        want_entropy=return_entropy,
        want_smooth=label_smoothing > 0,
        want_argmax=return_argmax,
        backend=backend,
        workspace_mb=workspace_mb,
        tolerance=None if named is None else tolerance,
    )
    if share is not None:
        plan = dataclasses.replace(plan, partial_e=True, first_column=share.start)
    elif one_pass and tokens is None:
        plan = dataclasses.replace(plan, one_pass=_wanted_gradients(e, c, bias))
    if variant.filtered and variant.path is Path.TILED:
        plan = dataclasses.replace(plan, want_record=_wanted_gradients(e, c, bias) is not None)
    compute_dtype = torch.promote_types(torch.promote_types(e.dtype, c.dtype), torch.float32)
    weight = None if class_weight is None else class_weight.detach().to(compute_dtype)
    problem = Problem(
        e.reshape(-1, e.shape[-1]),
        c,
        flat_targets if tokens is None else tokens.own(flat_targets),
        bias,
        (weight if weight is None or share is None else weight[share.start : share.stop]) if plan.want_smooth else None,
        plan.softcap,
        plan.temperature,
        plan.first_column,
    )
    draw = _seed(seed, e.device) if variant.random else torch.zeros((), dtype=torch.int64, device=e.device)
    if share is not None and variant.random and seed is None:
        draw = common_seed(draw, share.group)
    if tokens is not None:
        draw = tokens.seed(draw)
    v: int | Tensor = c.shape[0]
    if share is not None:
        heads, shares = heads_of_shares(problem, plan, draw, share, return_lse)
        v = shares.vocabulary
        if check:
            v = check_shares(shares, class_weight)
            validation.check_range(targets[..., offset:], ignore_index, v)
    elif variant.path is Path.TILED:
        heads, record = forward_of(problem, plan, draw)
    else:
        heads = plain_heads(problem, plan, want_lse=return_lse or return_stats)
    if tokens is not None:
        heads = tokens.whole(heads, (True, return_lse, return_entropy, plan.want_smooth, return_argmax))

    per_token = _per_token_loss(heads, flat_targets, weight, label_smoothing, v)
    unflatten = lambda x: x.view(targets.shape)[..., : targets.shape[-1] - offset] if offset else x.view(targets.shape)  # noqa: E731
    loss = unflatten(per_token) if reduction == "none" else _reduce(per_token, flat_targets, weight, reduction)
    lse = unflatten(heads.lse) if return_lse else None
    if not (return_entropy or return_argmax or return_stats):
        return loss if lse is None else (loss, lse)
    stats = None
    if return_stats:
        kept, hits, path, certificate = _statistics(problem, plan, heads, draw)
        room = occupancy_of(problem, plan, heads, draw, record) if variant.path is Path.TILED else (None, None)
        stats = FilterStatistics(unflatten(kept), unflatten(hits), path, unflatten(certificate), *room, plan.tolerance)
    return LinearCrossEntropyOutput(
        loss,
        lse,
        unflatten(heads.entropy) if return_entropy else None,
        unflatten(heads.argmax) if return_argmax else None,
        stats,
        variant.name,
    )


def _automatic(
    e: Tensor, c: Tensor, backend: str, options: choosing.Options, shared: bool
) -> tuple[Variant, int | None]:
    """The variant and the workspace that impl="auto" stands for."""
    if shared:
        raise ValueError(
            "impl='auto' must be a variant's name where processes share the vocabulary or the tokens: they have to "
            "agree, and their shares may differ in size"
        )
    (v, d), dtype = c.shape, torch.promote_types(e.dtype, c.dtype)
    where = choosing.backend_of(e.device, e.dtype, c.dtype, backend)
    found = choosing.resolve(e.numel() // d, v, d, dtype, where, options)
    return get(found.impl), found.workspace_mb


def _wanted_gradients(e: Tensor, c: Tensor, bias: Tensor | None) -> tuple[bool, bool, bool] | None:
    """Which of e, c and bias a backward pass will ask for; None if there will be none."""
    wanted = (e.requires_grad, c.requires_grad, bias is not None and bias.requires_grad)
    return wanted if torch.is_grad_enabled() and any(wanted) else None


def _autocast(e: Tensor, c: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inputs as `F.linear` would see them under the current autocast."""
    kind = e.device.type
    if not torch.is_autocast_enabled(kind) or torch.float64 in (e.dtype, c.dtype):
        return e, c, bias
    dtype = torch.get_autocast_dtype(kind)
    return e.to(dtype), c.to(dtype), None if bias is None else bias.to(dtype)


def _flatten_targets(targets: Tensor, ignore_index: int, shift: int) -> Tensor:
    """(N,) int64 targets for the tokens of the flattened e; -1 where ignored or past the end of a shifted row."""
    flat = targets
    if shift:
        flat = torch.full_like(targets, ignore_index)
        flat[..., : targets.shape[-1] - shift] = targets[..., shift:]
    flat = flat.reshape(-1).to(torch.int64)
    return torch.where(flat == ignore_index, -1, flat)


def _seed(seed: int | None, device: torch.device) -> Tensor:
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)
    return torch.full((), seed, dtype=torch.int64, device=device)


def _per_token_loss(heads: Heads, targets: Tensor, weight: Tensor | None, smoothing: float, v: int | Tensor) -> Tensor:
    """(N,) losses from the heads: (1 - smoothing) w_t nll + smoothing / V sum_j w_j (lse - z_j), as
    `F.cross_entropy`."""
    loss = heads.nll
    if weight is not None:
        loss = loss * torch.where(targets >= 0, weight[targets.clamp(min=0)], 0)
    if smoothing > 0:
        loss = (1 - smoothing) * loss + (smoothing / v) * heads.smooth
    return loss


def _reduce(per_token: Tensor, targets: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    total = per_token.sum()
    if reduction == "sum":
        return total
    valid = targets >= 0
    if weight is None:
        return total / valid.sum()
    return total / torch.where(valid, weight[targets.clamp(min=0)], 0).sum()


def _statistics(problem: Problem, plan: Plan, heads: Heads, seed: Tensor) -> tuple[Tensor, Tensor, str, Tensor]:
    """(kept mass, hits, path, certificate), all but the path (N,)."""
    with torch.no_grad():
        if plan.variant.path is not Path.TILED:
            valid = problem.targets >= 0
            ones = valid.to(problem.compute_dtype)
            return ones, valid * problem.v, plan.variant.path.value, torch.zeros_like(ones)
        backend = choose_backend(problem, plan)
        if backend == "eager":  # the kernels alone flush
            plan = dataclasses.replace(plan, variant=dataclasses.replace(plan.variant, flushed=False))
        kept, hits, deviation = statistics_of(problem, plan, heads, seed)
        norms = [block.to(deviation.dtype).norm(dim=1).amax() for block in problem.c.detach().split(4096)]
        longest = functools.reduce(torch.maximum, norms) * (1 + 2.0**-10)
        if plan.variant.centred:  # the centre is a mean of rows
            longest = 2 * longest
        return kept, hits, backend, deviation * longest / problem.temperature


def compute_z_loss(
    lse: Tensor,
    targets: Tensor | None = None,
    shift: bool | int = False,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
) -> Tensor:
    """The z-loss lse^2 (PaLM, arXiv 2204.02311), which keeps log-sum-exps near 0; differentiable.

    Args:
        lse: the lse that `linear_cross_entropy(..., return_lse=True)` returned, of shape (...), or (..., T - shift).
        targets: (...) the targets of that call; tokens equal to `ignore_index` do not count. None: all count.
        shift: the shift of that call.
        reduction: "mean" over the tokens that count (NaN if none does), "sum" or "none".

    Raises TypeError or ValueError for shapes that do not belong together and for unknown reductions.
    """
    validation.check_reduction(reduction)
    offset = validation.check_shift(shift)
    z_loss = lse.square()
    if targets is not None:
        if offset:
            targets = targets[..., offset:]
        if targets.shape != lse.shape:
            raise ValueError(
                f"lse and targets (after shift={shift!r}) must have one shape, "
                f"got {tuple(lse.shape)} and {tuple(targets.shape)}"
            )
        valid = targets != ignore_index
        z_loss = torch.where(valid, z_loss, 0)
        if reduction == "mean":
            return z_loss.sum() / valid.sum()
    if reduction == "none":
        return z_loss
    return z_loss.sum() if reduction == "sum" else z_loss.mean()


class LinearCrossEntropy(nn.Module):
    """`linear_cross_entropy` as a module: takes its options once, then e, c, targets and bias at each call.

    Options are the arguments of `linear_cross_entropy` beside the tensors, by name or in its order; one that is unknown
    or given twice raises TypeError.
    """

    def __init__(self, *placed: Any, **options: Any) -> None:
        super().__init__()
        known = validation.option_names(linear_cross_entropy)
        by_place = validation.by_position(linear_cross_entropy, placed, "LinearCrossEntropy")
        for name in options:
            if name not in known:
                raise unknown_keyword("LinearCrossEntropy", name, known)
            if name in by_place:
                raise TypeError(f"LinearCrossEntropy got {name} twice, by position and by name")
        options = by_place | options
        if (impl := options.get("impl", DEFAULT)) != choosing.AUTO:
            get(impl)
        validation.check_reduction(options.get("reduction", "mean"))
        self.options = options

    @suggests
    def forward(
        self, e: Tensor, c: Tensor, targets: Tensor, bias: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor] | LinearCrossEntropyOutput:
        """See `linear_cross_entropy`."""
        return linear_cross_entropy(e, c, targets, bias, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
