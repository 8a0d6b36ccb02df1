"""Bad input: each call raises ValueError or TypeError whose message names the argument, what was given and what is
allowed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import pytest
import torch

from cce_precision import Filter, FilterKind, Granularity, LinearCrossEntropy, compute_z_loss
from cce_precision import linear_cross_entropy as lce
from cce_precision.numerics import Accumulation, Variant

N, V, D = 6, 10, 4


def good() -> dict[str, Any]:
    return {"e": torch.randn(N, D), "c": torch.randn(V, D), "targets": torch.arange(N)}


@dataclass(frozen=True)
class Bad:
    """One kind of bad input. `given` and `allowed` are pieces that the message must contain, beside the argument's
    name."""

    argument: str
    value: Callable[[], Any] | Any
    given: str
    allowed: str
    kind: type[Exception] = ValueError
    others: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return f"{self.argument}-{self.given or self.allowed}".replace(" ", "")


def targets(*values: int) -> torch.Tensor:
    return torch.tensor([*values, *[0] * (N - len(values))])


def zero3(shape: tuple[int, ...]) -> torch.Tensor:
    """A parameter as DeepSpeed's ZeRO-3 leaves it outside its module's forward."""
    empty = torch.nn.Parameter(torch.empty(0))
    empty.ds_id, empty.ds_shape = 7, torch.Size(shape)  # type: ignore[attr-defined]
    return empty


KNOWN = "cce_exact"
BAD = (
    # tensors: types and dtypes
    Bad("e", [[1.0]], "list", "torch.Tensor", TypeError),
    Bad("e", numpy.ones((N, D)), "ndarray", "torch.Tensor", TypeError),
    Bad("e", None, "NoneType", "torch.Tensor", TypeError),
    Bad("e", lambda: torch.ones(N, D, dtype=torch.int64), "torch.int64", "float32", TypeError),
    Bad("e", lambda: torch.ones(N, D, dtype=torch.complex64), "torch.complex64", "float32", TypeError),
    Bad("e", lambda: torch.ones(N, D).to(torch.float8_e4m3fn), "float8", "bfloat16", TypeError),
    Bad("c", "C", "str", "torch.Tensor", TypeError),
    Bad("c", lambda: torch.ones(V, D, dtype=torch.bool), "torch.bool", "float32", TypeError),
    Bad("c", lambda: zero3((V, D)), "ZeRO-3 shard of shape (10, 4)", "deepspeed.zero.GatheredParameters([c])"),
    Bad("c", lambda: zero3((V, D)), "outside its module's forward", "inside the forward of a module"),
    Bad("bias", lambda: zero3((V,)), "ZeRO-3 shard of shape (10,)", "deepspeed.zero.GatheredParameters([bias])"),
    Bad("targets", [0] * N, "list", "torch.Tensor", TypeError),
    Bad("targets", lambda: torch.full((N,), float("nan")), "torch.float32", "integer", TypeError),
    Bad("targets", lambda: torch.ones(N), "torch.float32", "int64", TypeError),
    Bad("targets", lambda: torch.ones(N, dtype=torch.bool), "torch.bool", "int64", TypeError),
    Bad("bias", [0.0] * V, "list", "torch.Tensor", TypeError),
    Bad("bias", lambda: torch.ones(V, dtype=torch.int32), "torch.int32", "float32", TypeError),
    Bad("class_weight", [1.0] * V, "list", "torch.Tensor", TypeError),
    Bad("class_weight", lambda: torch.ones(V, dtype=torch.int64), "torch.int64", "floating", TypeError),
    # tensors: shapes
    Bad("e", lambda: torch.ones(D), "(4,)", "2 dimensions"),
    Bad("e", lambda: torch.ones(N, D + 1), "(6, 5)", "D = 4"),
    Bad("e", lambda: torch.ones(()), "()", "2 dimensions"),
    Bad("c", lambda: torch.ones(D), "(4,)", "(V, D)"),
    Bad("c", lambda: torch.ones(1, V, D), "(1, 10, 4)", "(V, D)"),
    Bad("c", lambda: torch.ones(0, D), "(0, 4)", "V >= 1"),
    Bad("targets", lambda: torch.zeros(N - 1, dtype=torch.int64), "(5,)", "(6,)"),
    Bad("targets", lambda: torch.zeros(N, 1, dtype=torch.int64), "(6, 1)", "(6,)"),
    Bad("targets", lambda: torch.zeros((), dtype=torch.int64), "()", "(6,)"),
    Bad("bias", lambda: torch.ones(V + 1), "(11,)", "(10,)"),
    Bad("bias", lambda: torch.ones(1, V), "(1, 10)", "(10,)"),
    Bad("class_weight", lambda: torch.ones(V - 1), "(9,)", "(10,)"),
    # tensors: devices and gradients
    Bad("c", lambda: torch.ones(V, D, device="meta"), "meta", "cpu"),
    Bad("targets", lambda: torch.zeros(N, dtype=torch.int64, device="meta"), "meta", "cpu"),
    Bad("bias", lambda: torch.ones(V, device="meta"), "meta", "cpu"),
    Bad("class_weight", lambda: torch.ones(V, device="meta"), "meta", "cpu"),
    Bad("class_weight", lambda: torch.ones(V, requires_grad=True), "gradient", "detach"),
    # targets: values
    Bad("targets", lambda: targets(V), "10", "[0, 10)"),
    Bad("targets", lambda: targets(1, -1), "-1", "ignore_index=-100"),
    Bad("targets", lambda: targets(-100, 7, 2**40), str(2**40), "[0, 10)"),
    Bad("targets", lambda: targets(-100), "-100", "ignore_index=-1", others=(("ignore_index", -1),)),
    Bad("targets", lambda: targets(0, V).to(torch.uint8), "10", "[0, 10)"),
    # numbers
    Bad("ignore_index", "none", "'none'", "int", TypeError),
    Bad("ignore_index", 1.5, "1.5", "int", TypeError),
    Bad("ignore_index", None, "None", "int", TypeError),
    Bad("ignore_index", True, "True", "int", TypeError),
    Bad("softcap", 0, "0", "> 0"),
    Bad("softcap", -30.0, "-30.0", "> 0"),
    Bad("softcap", float("nan"), "nan", "finite"),
    Bad("softcap", float("inf"), "inf", "finite"),
    Bad("softcap", "30", "'30'", "number > 0", TypeError),
    Bad("softcap", True, "True", "number > 0", TypeError),
    Bad("temperature", 0.0, "0.0", "> 0"),
    Bad("temperature", -1, "-1", "> 0"),
    Bad("temperature", float("inf"), "inf", "finite"),
    Bad("temperature", None, "None", "number > 0", TypeError),
    Bad("label_smoothing", -0.1, "-0.1", "[0, 1]"),
    Bad("label_smoothing", 1.5, "1.5", "[0, 1]"),
    Bad("label_smoothing", float("nan"), "nan", "[0, 1]"),
    Bad("label_smoothing", "0.1", "'0.1'", "[0, 1]", TypeError),
    Bad("shift", -1, "-1", ">= 0"),
    Bad("shift", 1.0, "1.0", "int", TypeError),
    Bad("shift", "1", "'1'", "int", TypeError),
    Bad("shift", None, "None", "int", TypeError),
    Bad("shift", N, "6", "smaller"),
    Bad("shift", N + 5, "11", "smaller"),
    Bad("workspace_mb", 0, "0", "> 0"),
    Bad("workspace_mb", -5, "-5", "> 0"),
    Bad("workspace_mb", 1.5, "1.5", "int", (TypeError, ValueError)),  # type: ignore[arg-type]
    Bad("seed", 2**70, str(2**70), "64 bits"),
    Bad("seed", 0.5, "0.5", "int", (TypeError, ValueError)),  # type: ignore[arg-type]
    Bad("tolerance", 1e-3, "0.001", "None"),
    # words
    Bad("reduction", "avg", "'avg'", "'mean', 'sum', 'none'"),
    Bad("reduction", None, "None", "'mean', 'sum', 'none'"),
    Bad("backend", "cuda", "'cuda'", "'auto', 'triton', 'eager'"),
    Bad("backend", "triton", "", "'eager'", others=(("impl", KNOWN),)),
    Bad("validate", "always", "'always'", "'auto'"),
    Bad("impl", "cce_exat", "'cce_exat'", "did you mean 'cce_exact'"),
    Bad("impl", "nonsense", "'nonsense'", "cce_kahan_full_c"),
    Bad("impl", 3, "int", "Variant", TypeError),
    Bad("impl", None, "NoneType", "Variant", TypeError),
    Bad("vocab_parallel_options", "all", "str", "VocabParallelOptions", TypeError),
    # options that a variant cannot honour, or nobody can
    Bad("filter_eps", "high", "'high'", "'auto'", (TypeError, ValueError)),  # type: ignore[arg-type]
    Bad("filter_eps", -1e-3, "-0.001", "[0, 1]"),
    Bad("filter_eps", 1.5, "1.5", "[0, 1]"),
    Bad("filter_eps", float("nan"), "nan", "[0, 1]"),
    Bad("filter_eps", True, "True", "[0, 1]", TypeError),
    Bad("filter_eps", 1e-3, "0.001", "'cce'", others=(("impl", "cce_exact"),)),
    Bad("filter_eps", 1e-3, "0.001", "'cce'", others=(("impl", "baseline"),)),
    Bad("accum_e_fp32", True, "True", "cce_exact", others=(("impl", "baseline"),)),
    Bad("accum_c_fp32", True, "True", "cce_exact", others=(("impl", "torch_compile"),)),
)


def test_there_are_at_least_forty_kinds() -> None:
    assert len(BAD) >= 40


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_bad_input_is_named(bad: Bad) -> None:
    if bad.argument == "backend" and bad.value == "triton" and torch.cuda.is_available():
        pytest.skip("the kernels can run here")
    value = bad.value() if callable(bad.value) else bad.value
    with pytest.raises(bad.kind) as raised:
        lce(**(good() | dict(bad.others) | {bad.argument: value}))
    message = str(raised.value)
    assert isinstance(raised.value, (ValueError, TypeError))
    for piece in (bad.argument, bad.given, bad.allowed):
        assert piece in message, message
    assert "\n" not in message


@pytest.mark.parametrize("bad", [bad for bad in BAD if bad.argument == "targets"], ids=str)
def test_baseline_refuses_the_same_targets(bad: Bad) -> None:
    value = bad.value() if callable(bad.value) else bad.value
    with pytest.raises((ValueError, TypeError), match="targets"):
        lce(**(good() | dict(bad.others) | {"targets": value, "impl": "baseline"}))


def test_a_shifted_target_out_of_range_is_named_and_one_that_is_shifted_away_is_not() -> None:
    inputs = good() | {"e": torch.randn(2, 3, D), "targets": torch.tensor([[V, 1, 2], [V + 7, 3, 4]])}
    assert torch.isfinite(lce(**inputs, shift=1))
    with pytest.raises(ValueError, match=rf"got {V} at index \(0, 0\) and 1 more"):
        lce(**inputs, shift=0)


def test_unchecked_targets_are_the_callers_business() -> None:
    with pytest.raises(ValueError, match="validate must be"):
        lce(**good(), validate="never")  # type: ignore[arg-type]
    assert torch.isfinite(lce(**good(), validate=False))


@pytest.mark.parametrize("impl", ["cce_exact", "cce", "cce_unbiased"])
def test_a_classifier_that_was_emptied_before_the_backward_pass_is_named(impl: str) -> None:
    """As ZeRO-3 does where it does not see the loss leave the module's forward."""
    inputs = good()
    inputs["c"] = torch.nn.Parameter(inputs["c"])
    loss = lce(**inputs, impl=impl)
    inputs["c"].data = torch.empty(0)
    with pytest.raises(ValueError, match=r"c must have its values in the backward pass too.*GatheredParameters"):
        loss.backward()  # type: ignore[union-attr]


def test_the_module_refuses_when_it_is_built() -> None:
    with pytest.raises(TypeError, match=r"unknown option 'redaction'.*reduction"):
        LinearCrossEntropy(redaction="mean")
    with pytest.raises(ValueError, match=r"reduction.*'avg'"):
        LinearCrossEntropy(reduction="avg")
    with pytest.raises(ValueError, match="'nonsense'"):
        LinearCrossEntropy(impl="nonsense")


def test_z_loss_refuses_what_does_not_belong_together() -> None:
    lse = torch.randn(N)
    with pytest.raises(ValueError, match=r"reduction.*'avg'"):
        compute_z_loss(lse, reduction="avg")
    with pytest.raises(ValueError, match=r"\(6,\) and \(5,\)"):
        compute_z_loss(lse, torch.zeros(N - 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="shift.*-1"):
        compute_z_loss(lse, torch.zeros(N, dtype=torch.int64), shift=-1)


def test_records_refuse_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match=r"eps.*\[0, 1\].*2"):
        Filter(FilterKind.DROP, eps=2.0)
    with pytest.raises(ValueError, match="share.*0"):
        Filter(FilterKind.SUBSET, share=0)
    with pytest.raises(ValueError, match="stochastic.*elements"):
        Filter(FilterKind.STOCHASTIC, Granularity.TILE)
    with pytest.raises(ValueError, match="mine.*fp32"):
        Variant("mine", "", accum_e=Accumulation.INPUT, accum_c=Accumulation.INPUT)
    with pytest.raises(ValueError, match="mine: centred.*by element.*TILE"):
        Variant("mine", "", centred=True, filter_e=Filter(FilterKind.DROP, Granularity.TILE))
    with pytest.raises(ValueError, match="mine: centred.*input"):
        Variant("mine", "", centred=True, accum_e=Accumulation.INPUT)


def test_a_second_derivative_is_refused() -> None:
    e, c = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    (grad,) = torch.autograd.grad(lce(e, c, torch.arange(N)), e, create_graph=True)
    with pytest.raises(NotImplementedError, match="impl='baseline'"):
        torch.autograd.grad(grad.sum(), c)
