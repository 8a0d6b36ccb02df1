"""Clusters of two programs that copy for each other: each brings half of the tile that both multiply by, to both.

Gluon 3.6 knows no copy to several programs and no arrival at another's barrier. So a kernel marks the copies that go to
all (`to_all`), and Triton's stage hook completes its PTX: those copies become multicasts, every arrival at a barrier is
one at the other program's too, and the kernel asks for its clusters by itself. A mark is no PTX: without the hook a
kernel does not assemble.

Programs 2 i and 2 i + 1 are a cluster. Both must take the same steps, and a stage's barrier for what is free expects
the consumers of both. PTX: the Parallel Thread Execution ISA 8, "cp.async.bulk.tensor", "mapa", "barrier.cluster".
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from triton import knobs
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = ["MARK", "SIZE", "completed", "init_fence", "meet", "to_all"]

SIZE = 2  # programs of a cluster

# Triton's cache knows a kernel by its source: the mark changes with what this module makes of it
MARK = gl.constexpr(f"cce.to.all.{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]};")
_COPY = re.compile(
    r"(cp\.async\.bulk\.tensor\.2d\.shared::cluster\.global\.mbarrier::complete_tx::bytes)( [^;]*);", re.MULTILINE
)
_ARRIVE = re.compile(r"^\s*((?:@\S+ )?)mbarrier\.arrive\.shared::cta\.b64 _, \[(%\w+)(?:\+(\d+))?\];", re.MULTILINE)


@gluon.jit
def emit(ASM: gl.constexpr):
    """PTX without operands, where it stands."""
    asm: gl.constexpr = ASM + " mov.b32 $0, $1;"  # an inline assembly must have a result
    gl.inline_asm_elementwise(asm, "=r,r", [gl.to_tensor(0)], gl.int32, False, 1)


@gluon.jit
def to_all(CLUSTER: gl.constexpr):
    """Marks the next copy into shared memory as one to all programs of the cluster."""
    if CLUSTER > 1:
        emit(MARK)


@gluon.jit
def init_fence(CLUSTER: gl.constexpr):
    """Makes the barriers that this thread has set up known to the cluster, before it meets."""
    if CLUSTER > 1:
        emit("fence.mbarrier_init.release.cluster;")


@gluon.jit
def meet(CLUSTER: gl.constexpr):
    """Waits for all threads of the cluster, each of which must come here as often."""
    if CLUSTER > 1:
        emit("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;")


def completed(ptx: str) -> str:
    """The PTX of a kernel with the clusters that its marks ask for; of one without marks as it is."""
    first, *marked = ptx.split(MARK.value)
    if not marked:
        return ptx
    everybody = (1 << SIZE) - 1
    parts = [_COPY.subn(rf"\1.multicast::cluster\2, {everybody};", part, count=1) for part in marked]
    assert all(found == 1 for _, found in parts)
    ptx, arrivals = _ARRIVE.subn(_arrive_everywhere, "".join([first, *(part for part, _ in parts)]))
    ptx, entries = re.subn(r"(\.reqntid [^\n]*\n)", rf"\1.reqnctapercluster {SIZE}, 1, 1\n", ptx)
    assert arrivals > 0 and entries == 1
    return ptx


def _arrive_everywhere(found: re.Match[str]) -> str:
    where, register, offset = found.groups()
    return f"""{found[0]}
	{{
	.reg .b32 cce_other, cce_at;
	mov.u32 cce_other, %cluster_ctarank;
	xor.b32 cce_other, cce_other, 1;
	add.u32 cce_at, {register}, {offset or 0};
	mapa.shared::cluster.u32 cce_at, cce_at, cce_other;
	{where}mbarrier.arrive.shared::cluster.b64 _, [cce_at];
	}}"""


def _install() -> None:
    before = knobs.runtime.add_stages_inspection_hook

    def hook(compiler: Any, stages: dict[str, Any], options: Any, language: Any, capability: Any) -> None:
        if before is not None:
            before(compiler, stages, options, language, capability)
        make = stages["ptx"]
        stages["ptx"] = lambda source, metadata: completed(make(source, metadata))

    knobs.runtime.add_stages_inspection_hook = hook


_install()
