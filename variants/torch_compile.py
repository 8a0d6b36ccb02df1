"""`torch_compile`: the expression of `baseline` under `torch.compile`, for machines without Triton kernels and for old
GPUs."""

from cce_precision.numerics import Path, Variant

VARIANT = Variant(
    name="torch_compile",
    summary="the baseline under torch.compile",
    path=Path.COMPILED,
    label_apart=False,
)
