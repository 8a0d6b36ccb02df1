"""A classifier whose rows are spread over processes: vocabulary parallelism.

Every process passes the same e and targets and its own rows of c. The passes run on those rows alone and know nothing
of the others; what each says of its share (lse, entropy, the target's nll, ...), a few numbers a token, is gathered
once, and every process forms the heads of the whole vocabulary from it, in fp64 and in one order: hence with the same
bits. The backward passes then run with the heads of the whole, so that P, and with it every filter's decision, is that
of the whole softmax. Their parts of dE are summed in the compute dtype and rounded once. The logits never travel.

The two collectives are one all-gather of 8 bytes a head, a token and a process, and one all-reduce of dE. Neither is
hidden behind the passes: the first is all that follows the forward pass, and dE is complete only with the last run of
columns; reports/parallel says what they cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .autograd import backward_of, forward_of
from .eager import plain_heads
from .numerics import Path
from .problem import ELSEWHERE, Heads, Plan, Problem, Upstream

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Shares", "VocabParallelOptions", "check_options", "check_shares", "common_seed", "heads_of_shares"]


@dataclass(frozen=True)
class VocabParallelOptions:
    """This process holds the rows [start, stop) of the classifier; `group` holds the others.

    The processes of `group` (None: all) pass the same e and targets, in the same order of calls, and rows that
    together are the vocabulary, each row once; a run may be empty. Each gets the same loss and heads, bit by bit, and
    the gradients of its own rows of c and bias. The gradient of e is the sum over the group (`reduce_e_grad`), or with
    reduce_e_grad=False this process's part of that sum.

        share = VocabParallelOptions.from_vocab(vocab_size)
        loss = linear_cross_entropy(e, c[share.start : share.stop], targets, vocab_parallel_options=share)

    Filters decide by the softmax of the whole vocabulary. Random ones draw by the column's number in it, with one seed
    for the group (that of its first process where the call names none). What depends on the order of columns is each
    share's own: tiles, the order by mean logit, and the neighbours of which subset sampling draws one.
    """

    start: int
    stop: int
    group: ProcessGroup | None = None
    reduce_e_grad: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"start and stop must satisfy 0 <= start <= stop, got {self.start!r} and {self.stop!r}")

    @staticmethod
    def from_vocab(
        vocab_size: int, group: ProcessGroup | None = None, reduce_e_grad: bool = True
    ) -> VocabParallelOptions:
        """The options of this process where the group's processes share `vocab_size` rows in runs as equal as can be.

        Raises RuntimeError where torch.distributed is not initialised, ValueError for a vocabulary without a row.
        """
        if vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, got {vocab_size!r}")
        check_initialised("VocabParallelOptions.from_vocab")
        from torch import distributed

        rank, world = distributed.get_rank(group), distributed.get_world_size(group)
        return VocabParallelOptions(rank * vocab_size // world, (rank + 1) * vocab_size // world, group, reduce_e_grad)

    @property
    def columns(self) -> int:
        """How many rows of the classifier this process holds."""
        return self.stop - self.start


def check_options(options: object) -> VocabParallelOptions | None:
    """The options of a call. Raises TypeError for another type, RuntimeError without processes."""
    if options is None:
        return None
    if not isinstance(options, VocabParallelOptions):
        raise TypeError(
            f"vocab_parallel_options must be None or VocabParallelOptions, got {options!r} of {type(options).__name__}"
        )
    check_initialised("vocab_parallel_options")
    return options


def check_initialised(who: str) -> None:
    """Raises RuntimeError where torch.distributed has no process group."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        raise RuntimeError(f"{who} needs torch.distributed.init_process_group to have run")


# -- collectives -------------------------------------------------------------------------------------------------------
# As operators, which torch.compile can trace.


def _group(group: ProcessGroup | None) -> Any:
    from torch import distributed

    return distributed.group.WORLD if group is None else group


def _gather(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """(processes, *x.shape): x of every process, in the order of ranks; not differentiable."""
    operators, group = torch.ops._c10d_functional, _group(group)
    flat = operators.all_gather_into_tensor(x.detach().reshape(-1), group.size(), group.group_name)
    return operators.wait_tensor(flat).view(group.size(), *x.shape)


def _sum(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum of x over the processes, on each of them."""
    operators = torch.ops._c10d_functional
    return operators.wait_tensor(operators.all_reduce(x.contiguous(), "sum", _group(group).group_name))


def common_seed(seed: Tensor, group: ProcessGroup | None) -> Tensor:
    """The seed (0-dim) that the first process of the group drew."""
    return _gather(seed, group)[0]


# -- the heads of the whole from those of the shares ------------------------------------------------------------------


class Shares(NamedTuple):
    """What the processes say of their columns; fp64, the leading dimension runs over the processes."""

    start: Tensor  # (W,) first column
    stop: Tensor  # (W,)
    weight: Tensor  # (W,) sum of the column weights
    lse: Tensor  # (W, N) over the share; -inf where it holds nothing, or nothing that is not masked
    nll: Tensor  # (W, N) of the target within its owner's share; of no meaning elsewhere
    entropy: Tensor | None = None  # (W, N) of the softmax over the share
    smooth: Tensor | None = None  # (W, N) of the share
    best: Tensor | None = None  # (W, N) the largest logit
    argmax: Tensor | None = None  # (W, N) its column within the share

    @property
    def vocabulary(self) -> Tensor:
        """() number of columns of the whole, int64."""
        return (self.stop - self.start).sum().to(torch.int64)

    def pack(self) -> Tensor:
        """One process's own (leading dimensions absent) as one vector."""
        return torch.cat([x.reshape(-1).double() for x in self if x is not None])

    @staticmethod
    def unpack(packed: Tensor, n: int, plan: Plan) -> Shares:
        """From the vectors of all processes (W, 3 + heads * n)."""
        wanted = (True, True, plan.want_entropy, plan.want_smooth, plan.want_argmax, plan.want_argmax)
        rows = iter(packed[:, 3:].split(n, 1) if n else [packed[:, 3:]] * sum(wanted))
        return Shares(*packed[:, :3].unbind(1), *(next(rows) if w else None for w in wanted))  # type: ignore[arg-type]

    def heads(self, targets: Tensor, dtype: torch.dtype) -> Heads:
        """The heads of the whole, of targets (N,) in the whole vocabulary or -1 where ignored, rounded once to `dtype`.

        A target that no process holds has nll NaN. Differentiable, with `Shares` of differentiable parts.
        """
        valid = targets >= 0
        empty = self.lse.new_zeros(0)
        keep = lambda x: torch.where(valid, x, 0)  # noqa: E731
        lse = torch.logsumexp(self.lse, 0)
        lse = torch.where(lse == -torch.inf, torch.nan, lse)  # all is masked
        entropy = smooth = argmax = None
        if self.entropy is not None:
            nothing = torch.exp(self.lse - lse) == 0  # NaN is not nothing
            own_lse, own = (torch.where(nothing, 0, x) for x in (self.lse, self.entropy))
            entropy = torch.where(nothing, 0, torch.exp(own_lse - lse) * (own + lse - own_lse)).sum(0)
        if self.smooth is not None:
            nothing = (self.stop == self.start)[:, None]
            own_lse, own = (torch.where(nothing, 0, x) for x in (self.lse, self.smooth))
            smooth = torch.where(nothing, 0, own + self.weight[:, None] * (lse - own_lse)).sum(0)
        if self.best is not None and self.argmax is not None:
            largest = (self.best == self.best.amax(0)) | self.best.isnan()  # NaN counts as largest
            argmax = torch.where(largest, self.argmax + self.start[:, None], torch.inf).amin(0)
            argmax = keep(argmax).to(torch.int64)
        rounded = (empty if x is None else keep(x) for x in (self._nll(targets), lse, entropy, smooth))
        nll, lse, entropy, smooth = (x.to(dtype) for x in rounded)
        return Heads(nll, lse, entropy, smooth, empty.to(torch.int64) if argmax is None else argmax)

    def _nll(self, targets: Tensor) -> Tensor:
        """(N,) log1p of the odds against the target: those within its owner's share, plus those of the other shares."""
        own = (targets >= self.start[:, None]) & (targets < self.stop[:, None])  # (W, N), one of each column
        nll = torch.where(own, self.nll, 0).sum(0)
        z_t = torch.where(own, self.lse - self.nll, 0).sum(0)
        others = torch.where(own, -torch.inf, self.lse - z_t)
        largest = torch.maximum(nll, others.amax(0)).detach()
        far = 60.0  # where odds + 1 and odds are one number in fp64
        near = torch.log1p(torch.expm1(nll.clamp(max=far)) + torch.exp(others.clamp(max=far)).sum(0))
        shift = torch.where(largest.isinf(), 0, largest)
        beyond = shift + torch.log(torch.exp(nll - shift) + torch.exp(others - shift).sum(0))
        result = torch.where(largest > far, beyond, near)
        result = torch.where((nll == torch.inf) | (largest == torch.inf), torch.inf, result)
        return torch.where(own.any(0), result, torch.nan)


def check_shares(shares: Shares, class_weight: Tensor | None) -> int:
    """The number of columns of the whole. Raises ValueError unless the shares are each column once, and class_weight is
    as long. Synchronises."""
    runs = sorted(zip(shares.start.long().tolist(), shares.stop.long().tolist()))
    runs = [run for run in runs if run[0] < run[1]]
    if not runs or runs[0][0] != 0 or any(a[1] != b[0] for a, b in zip(runs, runs[1:])):
        raise ValueError(
            "vocab_parallel_options: the rows [start, stop) of the group's processes must hold each row of the "
            f"vocabulary once, from 0 on, got {runs}"
        )
    v = runs[-1][1]
    if class_weight is not None and class_weight.shape != (v,):
        raise ValueError(f"class_weight must have shape (V,) = ({v},), got {tuple(class_weight.shape)}")
    return v


def _own_share(problem: Problem, plan: Plan, heads: Heads | None, options: VocabParallelOptions) -> Shares:
    """What this process says; differentiable as its heads are. `heads` None: it holds no column."""
    n, like = problem.n, problem.e.new_zeros((), dtype=torch.float64)
    number = lambda x: torch.full_like(like, x)  # noqa: E731
    weight = number(problem.v) if problem.column_weight is None else problem.column_weight.sum()
    start, stop = number(options.start), number(options.stop)
    optional = lambda wanted, x: x if wanted else None  # noqa: E731
    if heads is None:
        nothing, zero = like.new_full((n,), -torch.inf), like.new_zeros(n)
        return Shares(
            start, stop, weight, nothing, zero,
            optional(plan.want_entropy, zero), optional(plan.want_smooth, zero),
            optional(plan.want_argmax, nothing), optional(plan.want_argmax, zero),
        )  # fmt: skip
    lse, nll, smooth = heads.lse, heads.nll, heads.smooth
    if problem.bias is not None and problem.softcap is None:
        masked = (problem.bias == -torch.inf).all()  # the softmax of nothing is NaN
        lse, nll = torch.where(masked, -torch.inf, lse), torch.where(masked, torch.inf, nll)
        smooth = torch.where(masked, torch.inf, smooth)
    best = None
    if plan.want_argmax:
        tiled = plan.variant.path is Path.TILED
        best = _logits_at(problem, heads.argmax, problem.compute_dtype if tiled else problem.operand_dtype)
    return Shares(
        start, stop, weight, lse, nll,
        optional(plan.want_entropy, heads.entropy), optional(plan.want_smooth, smooth),
        best, optional(plan.want_argmax, heads.argmax),
    )  # fmt: skip


@torch.no_grad()
def _logits_at(problem: Problem, columns: Tensor, stored: torch.dtype) -> Tensor:
    """(N,) the logits of one column (N,) of each token, rounded to `stored` before the temperature."""
    dtype = problem.compute_dtype
    z = torch.cat(
        [(e.to(dtype) * problem.c[j].to(dtype)).sum(1) for e, j in zip(problem.e.split(1024), columns.split(1024))]
    )
    if problem.bias is not None:
        z = z + problem.bias[columns]
    z = z.to(stored)
    if problem.softcap is not None:
        z = problem.softcap * torch.tanh(z / problem.softcap)
    return z.to(dtype) / problem.temperature


def _within(targets: Tensor, options: VocabParallelOptions, otherwise: int) -> Tensor:
    """Targets as columns of this process's share; `otherwise` where another process holds them, -1 where ignored."""
    here = (targets >= options.start) & (targets < options.stop)
    return torch.where(here, targets - options.start, torch.where(targets >= 0, otherwise, -1))


class _TiledShares(torch.autograd.Function):
    """The heads of the whole by the tiled passes, differentiable once with respect to e, c and bias."""

    @staticmethod
    def forward(ctx, e, c, bias, targets, weight, seed, plan, options, want_lse):  # type: ignore[no-untyped-def]
        dummy = _within(targets, options, 0)  # any column does: nll is of use where the target is
        problem = Problem(e, c, dummy, bias, weight, plan.softcap, plan.temperature, plan.first_column)
        heads, record = forward_of(problem, plan, seed) if options.columns else (None, c.new_zeros(0, 0))
        packed = _gather(_own_share(problem, plan, heads, options).pack(), options.group)
        shares = Shares.unpack(packed, problem.n, plan)
        whole = shares.heads(targets, problem.compute_dtype)
        others = shares.weight.sum() - (problem.v if weight is None else weight.double().sum())
        ctx.plan, ctx.options, ctx.want_lse = plan, options, want_lse
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(whole.argmax, packed)
        ctx.save_for_backward(
            e, c, bias, targets, weight, seed, whole.nll, whole.lse, whole.entropy, record, others.to(whole.lse.dtype)
        )
        return *whole, packed

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        e, c, bias, targets, weight, seed, nll, lse, entropy, record, others = ctx.saved_tensors
        plan, options, need = ctx.plan, ctx.options, ctx.needs_input_grad[:3]
        wanted = (True, ctx.want_lse, plan.want_entropy, plan.want_smooth)  # torch.compile makes zeros of the others
        upstream = Upstream(*(g.contiguous() if g is not None and w else None for g, w in zip(grads, wanted)))
        if all(g is None for g in upstream):
            return (None,) * 9
        if upstream.smooth is not None:  # the column weights of the other processes
            part = others * upstream.smooth
            upstream = upstream._replace(lse=part if upstream.lse is None else upstream.lse + part)
        here = _within(targets, options, ELSEWHERE)
        problem = Problem(e, c, here, bias, weight, plan.softcap, plan.temperature, plan.first_column)
        if options.columns:
            d_e, d_c, d_bias = backward_of(problem, plan, (nll, lse, entropy), upstream, need, seed, record)
        else:
            d_e = torch.zeros(e.shape, dtype=problem.compute_dtype, device=e.device)
            d_c, d_bias = torch.zeros_like(c), c if bias is None else torch.zeros_like(bias)
        if need[0]:
            d_e = (_sum(d_e, options.group) if options.reduce_e_grad else d_e).to(e.dtype)
        return (*(g if wanted else None for g, wanted in zip((d_e, d_c, d_bias), need)), *(None,) * 6)


class _SumOfGradients(torch.autograd.Function):
    """x; its gradient is summed over the processes in `dtype` and rounded once."""

    @staticmethod
    def forward(ctx, x, group, dtype):  # type: ignore[no-untyped-def]
        ctx.group, ctx.dtype = group, dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return _sum(gradient.to(ctx.dtype), ctx.group).to(gradient.dtype), None, None


def _plain_shares(problem: Problem, plan: Plan, options: VocabParallelOptions) -> tuple[Heads, Tensor]:
    """The heads of the whole by stored logits of the own share; PyTorch differentiates this share's part alone."""
    from torch import distributed

    e = problem.e
    if options.reduce_e_grad and e.requires_grad:
        e = _SumOfGradients.apply(e, options.group, problem.compute_dtype)
    local = Problem(
        e, problem.c, _within(problem.targets, options, 0), problem.bias, problem.column_weight, problem.softcap,
        problem.temperature,
    )  # fmt: skip
    heads = plain_heads(local, plan, want_lse=True) if options.columns else None
    own = _own_share(local, plan, heads, options).pack()
    if heads is None:  # so that e, c and bias have gradients, all 0, and the sum of e's is taken here too
        own = own + sum(x[:0].sum() for x in (e, problem.c, problem.bias) if x is not None)
    packed = _gather(own, options.group)
    rank = torch.full((1,), distributed.get_rank(_group(options.group)), device=own.device)
    whole = Shares.unpack(packed.index_copy(0, rank, own[None]), problem.n, plan)
    return whole.heads(problem.targets, problem.compute_dtype), packed


def heads_of_shares(
    problem: Problem, plan: Plan, seed: Tensor, options: VocabParallelOptions, want_lse: bool
) -> tuple[Heads, Shares]:
    """The heads of the whole vocabulary and what they were made of; the heads are differentiable once, lse only if
    wanted.

    `problem`: this process's rows of c, bias and column weight, and targets in the whole vocabulary. `seed` is the
    group's.
    """
    if plan.variant.path is not Path.TILED:
        heads, packed = _plain_shares(problem, plan, options)
        return heads, Shares.unpack(packed, problem.n, plan)
    *outputs, packed = _TiledShares.apply(
        problem.e, problem.c, problem.bias, problem.targets, problem.column_weight, seed, plan, options, want_lse
    )
    return Heads(*outputs), Shares.unpack(packed, problem.n, plan)
