"""DTensor arguments: what their placements make of a call. Importing this does not import torch.distributed.

For each dimension of the mesh (e, c and bias must share one mesh, if they are DTensors):

    c, bias     e                         what happens
    Shard(0)    Replicate                 vocabulary-parallel: each process keeps its rows
    Shard(0)    Shard (token dimension)   the same, with e gathered; its gradient is summed, each keeps its tokens'
    Replicate   Shard (token dimension)   each process keeps its tokens, the heads are gathered; c's gradient is summed
    Replicate   Replicate                 every process computes the same
    Replicate   a plain tensor            c is each process's own: its gradient is that of this process's e alone
    Shard(0)    a plain tensor            c is gathered, as e may differ between the processes (FSDP2, ZeRO-3)

In the last case the gradient of c is the mean of the processes' gradients, each with its own e, as `fully_shard`
reduces the gradients of a model's other weights. Who means vocabulary parallelism instead says so: e as a DTensor
`Replicate`, or `vocab_parallel_options`, which take the local rows of c. Gradients come back as DTensors placed as the
argument. Results are plain tensors of the whole batch, the same on every process of the mesh. Targets and class weights
may be plain (whole) or DTensors. Any other placement raises ValueError.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .parallel import VocabParallelOptions
from .problem import Heads

if TYPE_CHECKING:
    from torch.distributed.tensor import DeviceMesh

__all__ = ["Placed", "Tokens", "place"]


def _is_dtensor(x: object) -> bool:
    if x is None or type(x) is Tensor or type(x) is nn.Parameter or not isinstance(x, Tensor):
        return False
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def _whole(x: Any) -> Any:
    """A DTensor without a gradient as the whole plain tensor."""
    return x.full_tensor() if _is_dtensor(x) else x


@dataclass(frozen=True)
class Tokens:
    """How the processes of a mesh share the tokens; `placements` are `Shard` where they do, else `Replicate`."""

    mesh: DeviceMesh
    placements: tuple[Any, ...]
    shape: torch.Size  # of the targets
    own_shape: torch.Size  # of this process's

    def own(self, flat: Tensor) -> Tensor:
        """This process's part of a plain tensor of all tokens (N,)."""
        from torch.distributed.tensor import distribute_tensor

        whole = flat.view(self.shape)
        return distribute_tensor(whole, self.mesh, self.placements, src_data_rank=None).to_local().reshape(-1)

    def whole(self, heads: Heads, wanted: tuple[bool, bool, bool, bool, bool]) -> Heads:
        """The heads of all tokens from this process's, those wanted; differentiable."""
        return Heads(*(self._whole(x) if w else x for x, w in zip(heads, wanted)))

    def _whole(self, x: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        stride = torch.empty(self.shape, device="meta").stride()
        local = x.view(self.own_shape)
        placed = DTensor.from_local(local, self.mesh, self.placements, shape=self.shape, stride=stride)
        return placed.full_tensor().reshape(-1)

    def seed(self, draw: Tensor) -> Tensor:
        """A seed of its own for each part of the tokens, whose rows are numbered from 0 in each."""
        place = 0
        for dim, placement in enumerate(self.placements):
            if placement.is_shard():
                place = place * self.mesh.size(dim) + self.mesh.get_local_rank(dim)
        return draw + place * 0x1E3779B97F4A7C15


class Placed(NamedTuple):
    """A call in plain tensors. `tokens`: how e is a part of the tokens, None where it is all; targets are all."""

    e: Tensor
    c: Tensor
    targets: Tensor
    bias: Tensor | None
    class_weight: Tensor | None
    options: VocabParallelOptions | None
    tokens: Tokens | None = None


def place(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    options: VocabParallelOptions | None,
) -> Placed:
    """The call that the placements mean, as the module's table says. Plain tensors pass unchanged.

    Raises ValueError for placements without a meaning, naming the argument.
    """
    targets, class_weight = _whole(targets), _whole(class_weight)
    if not any(_is_dtensor(x) for x in (e, c, bias)):
        return Placed(e, c, targets, bias, class_weight, options)
    if options is not None:
        return Placed(_replicated(e), _own_rows(c, "c"), targets, _own_rows(bias, "bias"), class_weight, options)
    if not _is_dtensor(e):
        return Placed(e, _of_process(c, "c"), targets, _of_process(bias, "bias"), class_weight, None)
    if not _is_dtensor(c):
        if not all(p.is_replicate() for p in e.placements):  # type: ignore[attr-defined]
            raise ValueError(
                f"c must be a DTensor on the mesh of e, whose placements are {_names(e)}, got a plain tensor"
            )
        return Placed(_replicated(e), c, targets, _of_process(bias, "bias"), class_weight, None)
    return _on_one_mesh(e, c, targets, bias, class_weight)


def _names(x: Any) -> str:
    return str(tuple(x.placements))


def _shards_rows(placement: Any) -> bool:
    from torch.distributed.tensor import Shard

    return type(placement) is Shard and placement.dim == 0


def _replicated(e: Any) -> Tensor:
    if _is_dtensor(e):
        if not all(p.is_replicate() for p in e.placements):
            raise ValueError(f"e must be Replicate on each dimension of its mesh in this call, got {_names(e)}")
        return e.to_local()
    return e


def _own_rows(x: Any, name: str) -> Any:
    """The local rows, where the caller says that they are what this process shares."""
    if not _is_dtensor(x):
        return x
    if not all(_shards_rows(p) or p.is_replicate() for p in x.placements):
        raise ValueError(f"{name} must be Shard(0) or Replicate on each dimension of its mesh, got {_names(x)}")
    return x.to_local()


def _of_process(x: Any, name: str) -> Any:
    """Beside a plain e: the process's own tensor where it has one, else the gathered whole with the mean gradient."""
    from torch.distributed.tensor import Partial

    if not _is_dtensor(x):
        return x
    x_local = _own_rows(x, name)
    if all(p.is_replicate() for p in x.placements):
        return x_local
    whole, processes = x.full_tensor(grad_placements=[Partial()] * x.device_mesh.ndim), x.device_mesh.size()
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / processes)
    return whole


def _on_one_mesh(e: Any, c: Any, targets: Tensor, bias: Any, class_weight: Tensor | None) -> Placed:
    """e and c are DTensors."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    mesh = c.device_mesh
    for name, x in (("e", e), ("bias", bias)):
        if _is_dtensor(x) and x.device_mesh != mesh:
            raise ValueError(f"{name} must be a DTensor on the mesh of c, {mesh}, got one on {x.device_mesh}")
    if bias is not None and not (_is_dtensor(bias) and tuple(bias.placements) == tuple(c.placements)):
        got = _names(bias) if _is_dtensor(bias) else "a plain tensor"
        raise ValueError(f"bias must be a DTensor placed as c, {_names(c)}, got {got}")
    of_tokens = lambda p: type(p) is Shard and p.dim < e.ndim - 1  # noqa: E731
    for dim, (of_e, of_c) in enumerate(zip(e.placements, c.placements)):
        if not (_shards_rows(of_c) or of_c.is_replicate()):
            raise ValueError(f"c must be Shard(0) or Replicate on each dimension of its mesh, got {of_c} on {dim}")
        if not (of_tokens(of_e) or of_e.is_replicate()):
            raise ValueError(
                f"e must be Replicate or Shard along a dimension of tokens on each dimension of its mesh, got {of_e} "
                f"on {dim}"
            )
    rows = [dim for dim, p in enumerate(c.placements) if _shards_rows(p)]
    if len(rows) > 1:
        raise ValueError(f"c must be Shard(0) on one dimension of its mesh, got {_names(c)}")
    options = None
    if rows:
        size = -(-c.shape[0] // mesh.size(rows[0]))
        start = min(mesh.get_local_rank(rows[0]) * size, c.shape[0])
        options = VocabParallelOptions(start, min(start + size, c.shape[0]), mesh.get_group(rows[0]))
    kept = tuple(Replicate() if dim in rows else p for dim, p in enumerate(e.placements))
    own = e.redistribute(placements=kept).to_local()
    gradient = [Partial() if p.is_shard() else of_c for p, of_c in zip(kept, c.placements)]
    # redistribute changes nothing but the gradient, which it brings from `gradient` to the placements of the argument.
    local = lambda x: x.redistribute(placements=x.placements).to_local(grad_placements=gradient)  # noqa: E731
    tokens = None
    if any(p.is_shard() for p in kept):
        if targets.shape != e.shape[:-1]:
            raise ValueError(f"targets must have shape {tuple(e.shape[:-1])}, got {tuple(targets.shape)}")
        tokens = Tokens(mesh, kept, targets.shape, own.shape[:-1])
    return Placed(own, local(c), targets, None if bias is None else local(bias), class_weight, options, tokens)
