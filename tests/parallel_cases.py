"""What the processes of tests/test_parallel.py run: problems of every variant, and cases of one feature each.

A case is a function of the process and its groups; what it returns is stored and judged by the test of the same name.
"""

from __future__ import annotations

import dataclasses
import datetime
import random
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.nn.functional  # before there is a group: its functions' defaults would hold it for ever
import torch.multiprocessing as multiprocessing
from torch import Tensor, distributed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from cce_precision import VocabParallelOptions, linear_cross_entropy
from cce_precision.analysis.bounds import CPU, Machine, bound
from cce_precision.analysis.bounds_parallel import parallel_bound
from cce_precision.analysis.fuzz import Verdict, compare, judge_outputs, outputs
from cce_precision.analysis.fuzz_problems import Call, Knobs, build, random_knobs
from cce_precision.analysis.references import truth
from cce_precision.autograd import choose_backend
from cce_precision.parallel import common_seed
from tests.strategies import EAGER, TILED

WORLD = 4
# On a CPU: between them every kernel that looks at targets, and what needs none.
INTERPRETED = ("cce_exact", "cce", "cce_unbiased", "baseline")
DRAWN = 2  # random problems a variant, beside the fixed ones


@dataclass(frozen=True)
class Place:
    """One process: its rank, and the group of two that it belongs to."""

    rank: int
    pair: distributed.ProcessGroup
    device: str = "cpu"
    world: int = WORLD

    @property
    def rank_of_pair(self) -> int:
        return self.rank % 2


CASES: dict[str, Callable[[Place], Any]] = {}


def case(function: Callable[[Place], Any]) -> Callable[[Place], Any]:
    CASES[function.__name__] = function
    return function


# -- problems of every variant -----------------------------------------------------------------------------------------


def fixed(impl: str) -> tuple[Knobs, ...]:
    """Problems of one variant that between them have every feature."""
    return (
        Knobs(
            seed=1, n=40, v=300, d=24, impl=impl, scale=3.0, margin=4.0, bias="fp32", ignored="some", nan_ignored=True
        ),
        Knobs(
            seed=2, n=24, v=140, d=17, impl=impl, e_dtype="fp32", softcap=5.0, temperature=0.7, reduction="none",
            use_lse=True, upstream="random", label_smoothing=0.1,
        ),
        Knobs(
            seed=3, n=30, v=257, d=12, impl=impl, e_dtype="fp16", batch=2, shift=1, class_weight=True,
            label_smoothing=0.1, reduction="sum", use_entropy=True, scale=8.0,
        ),
        Knobs(seed=4, n=24, v=60, d=9, impl=impl, pattern="masked", bias="fp32", use_entropy=True, z_loss=True),
        Knobs(seed=5, n=12, v=2, d=5, impl=impl, margin=25.0, e_dtype="fp32", reduction="sum"),  # V < processes
        Knobs(seed=6, n=12, v=40, d=5, impl=impl, ignored="all", nan_ignored=True),
        Knobs(seed=7, n=12, v=30, d=8, impl=impl, e_dtype="fp64", bias="same", margin=12.0),
    )  # fmt: skip


def problems(impl: str) -> list[Knobs]:
    rng = random.Random(impl)
    drawn = (random_knobs(rng, (impl,)) for _ in range(DRAWN))
    return [*fixed(impl), *(dataclasses.replace(k, tolerance=None) for k in drawn)]  # which the whole alone can keep


def cuts(k: Knobs, world: int) -> list[tuple[int, int]]:
    """Uneven shares, some of them empty."""
    rng = random.Random(k.seed + world)
    inner = sorted(rng.choice((rng.randint(0, k.v), i * k.v // world)) for i in range(1, world))
    return list(zip([0, *inner], [*inner, k.v]))


def shared(call: Call, options: VocabParallelOptions) -> Call:
    """The call of the process that holds the rows [start, stop)."""
    rows = slice(options.start, options.stop)
    bias = None if call.bias is None else call.bias[rows]
    return dataclasses.replace(
        call, c=call.c[rows], bias=bias, options=call.options | {"vocab_parallel_options": options}
    )


@case
def every_variant(place: Place) -> dict[tuple[str, int, int], dict[str, Tensor]]:
    """Outputs of every problem, by variant, number and processes."""
    results = {}
    for impl in EAGER:
        for i, k in enumerate(problems(impl)):
            call = build(k)
            share = cuts(call.knobs, WORLD)[place.rank]
            results[impl, i, WORLD] = outputs(shared(call, VocabParallelOptions(*share)))
            if i % 2 == place.rank // 2:  # the two pairs take turns
                share = cuts(call.knobs, 2)[place.rank_of_pair]
                results[impl, i, 2] = outputs(shared(call, VocabParallelOptions(*share, place.pair)))
    return results


# -- features ----------------------------------------------------------------------------------------------------------

SMALL = Knobs(seed=12, n=20, v=33, d=6, e_dtype="fp32", pattern="exact", scale=3.0)


def _call(place: Place, **options: Any) -> tuple[Tensor, Tensor, Any]:
    """e, this process's rows of c, and what a call with them returns."""
    call = build(SMALL)
    share = VocabParallelOptions.from_vocab(call.problem.v)
    e, c = call.e.detach().requires_grad_(), call.c[share.start : share.stop].detach().requires_grad_()
    return e, c, linear_cross_entropy(e, c, call.targets, **{"vocab_parallel_options": share} | options)


@case
def shares_of_from_vocab(place: Place) -> tuple[list[int], list[int]]:
    """For fewer and for more rows than processes."""
    few, many = VocabParallelOptions.from_vocab(3), VocabParallelOptions.from_vocab(7, place.pair)
    return [few.start, few.stop], [many.start, many.stop]


@case
def differentiated_again(place: Place) -> dict[str, Any]:
    """Backward twice through one graph, and the gradient of a gradient."""
    e, c, loss = _call(place)
    loss.backward(retain_graph=True)
    assert e.grad is not None and c.grad is not None
    first = e.grad.clone(), c.grad.clone()
    loss.backward()
    twice = e.grad, c.grad
    e, c, loss = _call(place)
    (gradient,) = torch.autograd.grad(loss, e, create_graph=True)
    try:
        gradient.sum().backward()
        second = "differentiated"
    except NotImplementedError as error:
        second = str(error)
    return {"once": first, "twice": twice, "second": second}


@case
def largest_logit(place: Place) -> dict[str, Tensor]:
    """Logits without a rounding, each twice or more: the lowest index wins, also across shares."""
    call = build(SMALL)
    c = torch.cat([call.c, call.c])[:40]
    whole = linear_cross_entropy(call.e, c, call.targets, return_argmax=True).argmax  # type: ignore[union-attr]
    share = VocabParallelOptions.from_vocab(40)
    rows = c[share.start : share.stop]
    own: Any = linear_cross_entropy(call.e, rows, call.targets, return_argmax=True, vocab_parallel_options=share)
    return {"whole": whole, "shared": own.argmax}


@case
def parts_of_e_gradient(place: Place) -> dict[str, Tensor]:
    """reduce_e_grad=False leaves this process's part."""
    e, _, loss = _call(place)
    loss.backward()
    share = VocabParallelOptions.from_vocab(SMALL.v)
    own, _, loss = _call(place, vocab_parallel_options=dataclasses.replace(share, reduce_e_grad=False))
    loss.backward()
    assert e.grad is not None and own.grad is not None
    total = own.grad.clone()
    distributed.all_reduce(total)
    return {"whole": e.grad, "part": own.grad, "sum": total}


class Sent(TorchDispatchMode):
    """The collectives that run inside, and the numbers that this process gives to each."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        if "c10d" in func.namespace and name != "wait_tensor":
            tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
            self.calls.append((name, sum(x.numel() for x in tensors)))
        return func(*args, **kwargs or {})


@case
def collectives(place: Place) -> dict[str, list[tuple[str, int]]]:
    """What a call of each variant sends, of more columns than anything that it may send."""
    n, d, v = 6, 5, 4000
    e, c, targets = torch.randn(n, d), torch.randn(v, d), torch.arange(n) * 600
    share = VocabParallelOptions.from_vocab(v)
    found = {}
    for impl in EAGER:
        own = e.clone().requires_grad_(), c[share.start : share.stop].clone().requires_grad_()
        with Sent() as sent:
            loss = linear_cross_entropy(*own, targets, impl=impl, vocab_parallel_options=share, validate=False)
            loss.backward()  # type: ignore[union-attr]
        assert own[0].grad is not None and bool(own[0].grad.any())
        found[impl] = sent.calls
    return found


@case
def seed_of_the_first(place: Place) -> list[int]:
    """The seed that a group draws: its first process's."""
    drawn = torch.tensor(10 + place.rank)
    return [int(common_seed(drawn, None)), int(common_seed(drawn, place.pair))]


@case
def refusals(place: Place) -> dict[str, str]:
    """The messages of calls that cannot be; every process gets one, so that none waits for another."""
    call, share = build(SMALL), VocabParallelOptions.from_vocab(SMALL.v)
    row = call.c[share.start : share.start + 1]
    gap = VocabParallelOptions(share.start + place.rank, share.start + place.rank + 1)
    far = torch.full_like(call.targets, SMALL.v)
    tries: dict[str, Callable[[], Any]] = {
        "type": lambda: _call(place, vocab_parallel_options=(0, 3)),
        "rows": lambda: linear_cross_entropy(call.e, call.c, call.targets, vocab_parallel_options=share),
        "bias": lambda: _call(place, bias=torch.zeros(SMALL.v)),
        "short class_weight": lambda: _call(place, class_weight=torch.ones(2)[: share.stop - 1]),
        "long class_weight": lambda: _call(place, class_weight=torch.ones(SMALL.v + 1)),
        "return_stats": lambda: _call(place, return_stats=True),
        "auto": lambda: _call(place, impl="auto"),
        "gap": lambda: linear_cross_entropy(call.e, row, call.targets, vocab_parallel_options=gap),
        "targets": lambda: linear_cross_entropy(
            call.e, call.c[share.start : share.stop], far, vocab_parallel_options=share
        ),
    }
    messages = {}
    for name, attempt in tries.items():
        try:
            attempt()
        except (TypeError, ValueError) as error:
            messages[name] = str(error)
    return messages


def compiled(rank: int, folder: str) -> None:
    """One of two processes: calls under torch.compile without a graph break, beside the same in eager mode."""
    _start(rank, 2, folder)
    call = build(SMALL)
    share = VocabParallelOptions.from_vocab(SMALL.v)
    results = {}
    for impl in ("cce_exact", "cce", "cce_unbiased", "baseline"):

        def loss_of(e: Tensor, c: Tensor, targets: Tensor, impl: str = impl) -> Any:
            return linear_cross_entropy(e, c, targets, impl=impl, vocab_parallel_options=share, seed=3)

        results[impl] = []
        for function in (loss_of, torch.compile(loss_of, fullgraph=True, backend="aot_eager")):
            e, c = call.e.detach().requires_grad_(), call.c[share.start : share.stop].detach().requires_grad_()
            loss = function(e, c, call.targets)
            loss.backward()
            results[impl].append((loss.detach(), e.grad, c.grad))
    torch.save(results, Path(folder, f"{rank}.pt"))
    distributed.destroy_process_group()


def whole_of(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The outputs of all processes that shared a problem as those of one. Raises where they differ by a bit."""
    whole = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if name in ("dC", "dbias"):
            whole[name] = torch.cat(values)
        else:
            assert all(torch.equal(x.nan_to_num(), values[0].nan_to_num()) for x in values), name
            whole[name] = values[0]
    return whole


def verdict_of(
    parts: list[dict[str, Tensor]], k: Knobs, machine: Machine = CPU, alone: dict[str, Tensor] | None = None
) -> Verdict:
    """The verdict on the outputs of all processes that shared a problem; with those of a process `alone`, also on
    their difference."""
    whole, call = whole_of(parts), build(k)
    shares, options = cuts(call.knobs, len(parts)), {"seed": call.knobs.seed, "machine": machine}
    allowed = parallel_bound(call.problem, call.plan, shares, call.objective, **options)
    verdict = judge_outputs(call, whole, truth(call.problem, call.objective), allowed)
    if alone is not None:
        own = bound(call.problem, call.plan, call.objective, **options)
        for name, value in alone.items():
            both = getattr(allowed, name) + getattr(own, name)
            verdict.quantities[f"{name} less that of one process"] = compare(whole[name], value.double(), both)
    return verdict


# -- the processes -----------------------------------------------------------------------------------------------------


def start(function: Callable[..., None], *arguments: object, processes: int) -> None:
    """Runs function(rank, *arguments) in processes that a server forks, so that they import PyTorch once."""
    preload = ["tests.parallel_placements", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor"]
    multiprocessing.get_context("forkserver").set_forkserver_preload(preload)
    multiprocessing.start_processes(function, args=arguments, nprocs=processes, start_method="forkserver")


def _start(rank: int, world: int, folder: str, device: str = "cpu") -> str:
    """Makes this process one of `world`: under gloo on the CPU, or with a GPU of its own under NCCL. Returns its
    device."""
    torch.set_num_threads(1)
    on_gpu = device != "cpu"
    if on_gpu:
        torch.cuda.set_device(rank)
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=300 if on_gpu else 120),  # on a GPU one may compile while the other waits
        device_id=torch.device("cuda", rank) if on_gpu else None,
    )
    return f"cuda:{rank}" if on_gpu else "cpu"


def run(rank: int, folder: str, names: list[str], device: str = "cpu", world: int = WORLD) -> None:
    """One of `world` processes, each with a GPU of its own where device is "cuda": runs the cases and stores what they
    return."""
    from tests import parallel_placements  # noqa: F401  (its cases)

    own = _start(rank, world, folder, device)
    pairs = [distributed.new_group([i, i + 1]) for i in range(0, world, 2)]
    place = Place(rank, pairs[rank // 2], own, world)
    results = {}
    for name in names:
        torch.manual_seed(rank)
        results[name] = tree_map_only(Tensor, Tensor.cpu, CASES[name](place))
    torch.save(results, Path(folder, f"{rank}.pt"))
    distributed.destroy_process_group()


def kernel_problems(impl: str, device: str) -> list[Knobs]:
    """Problems for one device; on a GPU one is large enough for all tiles of the kernels. What plain PyTorch computes
    has a bound there in fp32 alone."""
    common: dict[str, Any] = {"impl": impl, "scale": 3.0, "margin": 4.0, "ignored": "some", "nan_ignored": True}
    if impl not in TILED:
        common["e_dtype"] = "fp32"
    if device == "cpu":
        return [Knobs(seed=8, n=20, v=150, d=17, **common)] if impl in INTERPRETED else []
    large = Knobs(seed=8, n=300, v=2000, d=128, bias="fp32", **common)
    return [large, *fixed(impl)[:3]] if impl in TILED else [large]


def run_kernels(rank: int, folder: str, device: str, impls: Sequence[str]) -> None:
    """One of two processes: each with a GPU, or with the interpreter where device is "cpu". The first also computes
    each problem alone. What it found of a variant is stored before the next, in folder/variant."""
    place = _start(rank, 2, folder, device)
    for impl in impls:
        results: dict[tuple[int, str], dict[str, Tensor] | str] = {}
        for i, k in enumerate(kernel_problems(impl, device)):
            for what in ("alone", "shared") if rank == 0 else ("shared",):  # both end with what they share
                try:
                    call = build(k, device=place)
                    if impl in TILED and choose_backend(call.placed(), call.plan) != "triton":
                        continue
                    share = VocabParallelOptions(*cuts(call.knobs, 2)[rank])
                    results[i, what] = outputs(shared(call, share) if what == "shared" else call)
                except Exception:  # the other variants are judged all the same
                    results[i, what] = traceback.format_exc()
        Path(folder, impl).mkdir(exist_ok=True)
        torch.save(results, Path(folder, impl, f"{rank}.pt"))
    distributed.destroy_process_group()


def judge_kernels(stored: list[dict[Any, Any]], impl: str, device: str, machine: Machine) -> tuple[int, set[str]]:
    """How many problems of a variant were computed, and which quantities would have told a zero; `stored`: what each
    process found of it."""
    telling, judged = set(), 0
    for i, k in enumerate(kernel_problems(impl, device)):
        if (i, "shared") not in stored[0]:
            continue
        parts, alone = [results[i, "shared"] for results in stored], stored[0][i, "alone"]
        assert not any(isinstance(part, str) for part in (*parts, alone)), (parts, alone)
        verdict = verdict_of(parts, k, machine, alone)
        assert verdict.holds, str(verdict)
        telling |= {name for name, q in verdict.quantities.items() if q.tells and q.truth > 0}
        judged += 1
    return judged, telling
