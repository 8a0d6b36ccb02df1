"""Coming from another implementation: the original's names, and keywords that lead to ours."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cce_precision as cut_cross_entropy
from cce_precision import LinearCrossEntropy, LinearCrossEntropyImpl, compute_z_loss, linear_cross_entropy
from cce_precision.analysis.bounds import bound
from cce_precision.analysis.references import Objective, truth
from cce_precision.migration import HINTS, suggests
from cce_precision.problem import Plan, Problem
from cce_precision.variants import ALL, DEFAULT, get

DOCUMENT = (Path(__file__).resolve().parents[1] / "docs" / "migration.md").read_text()
KNOWN = set(inspect.signature(linear_cross_entropy).parameters)


@pytest.fixture
def call() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(6, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True), torch.arange(6)


def test_the_originals_names_are_here(call: tuple[Tensor, Tensor, Tensor]) -> None:
    names = ("linear_cross_entropy", "LinearCrossEntropy", "LinearCrossEntropyImpl", "VocabParallelOptions")
    assert all(hasattr(cut_cross_entropy, name) and name in cut_cross_entropy.__all__ for name in names)
    e, c, targets = call
    module = cut_cross_entropy.LinearCrossEntropy(impl=LinearCrossEntropyImpl.CCE, reduction="sum")
    assert torch.equal(module(e, c, targets), linear_cross_entropy(e, c, targets, impl="cce", reduction="sum"))


def test_the_module_takes_the_originals_options_by_place(call: tuple[Tensor, Tensor, Tensor]) -> None:
    module = LinearCrossEntropy(2, 5.0, "sum", 1, impl="cce")
    named = linear_cross_entropy(*call, ignore_index=2, softcap=5.0, reduction="sum", shift=1, impl="cce")
    assert torch.equal(module(*call), named)
    assert not torch.equal(LinearCrossEntropy(0, 5.0, "sum", 1, impl="cce")(*call), named)
    order = list(inspect.signature(linear_cross_entropy).parameters)[4:16]
    assert list(LinearCrossEntropy(*[linear_default(name) for name in order]).options) == order
    with pytest.raises(TypeError, match="takes 12 options by position .*, got 13"):
        LinearCrossEntropy(*[linear_default(name) for name in order], "eager")
    with pytest.raises(TypeError, match="got softcap twice"):
        LinearCrossEntropy(-100, 5.0, softcap=5.0)


def linear_default(name: str) -> Any:
    return inspect.signature(linear_cross_entropy).parameters[name].default


def test_the_other_name_of_the_patch() -> None:
    pytest.importorskip("transformers")
    from cce_precision.huggingface import cce_patch, uncce_patch
    from cce_precision.transformers import __all__ as names

    assert set(names) == {"cce_patch", "uncce_patch"}
    from cce_precision import transformers as alias

    assert (alias.cce_patch, alias.uncce_patch) == (cce_patch, uncce_patch)


def test_a_member_of_the_enum_is_its_variant() -> None:
    for name, member in LinearCrossEntropyImpl.__members__.items():
        assert get(member.value) is get(member) and name == member.value.upper().replace("-", "_")
    assert {get(m) for m in LinearCrossEntropyImpl} == set(ALL.values())


def test_the_order_of_the_originals_arguments_is_kept() -> None:
    order = [
        "e", "c", "targets", "bias", "ignore_index", "softcap", "reduction", "shift", "return_lse", "filter_eps",
        "accum_e_fp32", "accum_c_fp32", "filter_e_grad", "filter_c_grad", "impl", "vocab_parallel_options",
    ]  # fmt: skip
    parameters = inspect.signature(linear_cross_entropy).parameters
    assert list(parameters)[: len(order)] == order
    assert all(parameters[name].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for name in order)


@pytest.mark.parametrize("name", sorted(HINTS))
def test_a_foreign_keyword_is_told_our_way(name: str, call: tuple[Tensor, Tensor, Tensor]) -> None:
    assert name not in KNOWN
    with pytest.raises(TypeError, match=rf"linear_cross_entropy got an unknown option '{name}'; .*") as raised:
        linear_cross_entropy(*call, **{name: 1})  # type: ignore[arg-type]
    advice = str(raised.value).partition("; ")[2]
    words = set(re.findall(r"\w+", advice))
    assert words & KNOWN or "nothing" in words, f"{advice} names no argument of ours"
    with pytest.raises(TypeError, match=f"LinearCrossEntropy got an unknown option '{name}'"):
        LinearCrossEntropy(**{name: 1})
    with pytest.raises(TypeError, match=rf"LinearCrossEntropy.forward got an unknown option '{name}'; ") as raised:
        LinearCrossEntropy()(*call, **{name: 1})
    assert str(raised.value).partition("; ")[2] == advice


def test_a_slip_is_told_the_nearest_name_and_nonsense_all_of_them(call: tuple[Tensor, Tensor, Tensor]) -> None:
    with pytest.raises(TypeError, match="did you mean 'label_smoothing'"):
        linear_cross_entropy(*call, label_smooth=0.1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="allowed: .*accum_c_fp32.*workspace_mb"):
        linear_cross_entropy(*call, qqq=0.1)  # type: ignore[call-arg]


def test_the_wrapper_changes_neither_signature_nor_documentation() -> None:
    def function(a: int, *, b: int = 2) -> int:
        """Adds."""
        return a + b

    wrapped = suggests(function)
    assert inspect.signature(wrapped) == inspect.signature(function) and wrapped.__doc__ == "Adds."
    assert wrapped(1, b=5) == 6
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        wrapped(b=5)


def test_it_compiles_without_a_break(call: tuple[Tensor, Tensor, Tensor]) -> None:
    e, c, targets = call
    compiled = torch.compile(
        lambda e: linear_cross_entropy(e, c, targets, softcap=5.0), backend="eager", fullgraph=True
    )
    assert torch.equal(compiled(e), linear_cross_entropy(e, c, targets, softcap=5.0))


def test_every_keyword_of_ours_in_the_table_exists() -> None:
    rows = [row.strip("|").split("|") for row in re.findall(r"^\|.+\|$", DOCUMENT, re.M)]
    ours = [cells[1] for cells in rows if len(cells) == 2]
    named = {name for cell in ours for name in re.findall(r"(?<![\w.])(\w+)=", cell)}
    assert len(named) > 8 and named - KNOWN == set()
    for function in {name for cell in ours for name in re.findall(r"(?<![\w.])(\w+)\(", cell)}:
        assert hasattr(cut_cross_entropy, function) or function in ("from_vocab", "mean", "float"), function


def test_liger_and_torch_calls_translated_give_their_loss(call: tuple[Tensor, Tensor, Tensor]) -> None:
    """Class weights, smoothing, bias and z-loss as the table translates them, against the truth within the bound."""
    e, c, targets = call
    bias, weight = torch.randn(11, requires_grad=True), torch.rand(11) + 0.5
    loss, lse = linear_cross_entropy(e, c, targets, bias, label_smoothing=0.1, class_weight=weight, return_lse=True)
    total = loss + 0.01 * compute_z_loss(lse, targets)
    total.backward()
    problem = Problem(e.detach(), c.detach(), targets, bias.detach(), weight, None, 1.0)
    plain = Objective(label_smoothing=0.1, class_weight=weight)
    z_only = Objective(nll=0.0, z_loss=0.01)
    plan = Plan(ALL[DEFAULT], None, 1.0, want_smooth=True)
    assert e.grad is not None
    exact, allowed = torch.zeros_like(e.grad, dtype=torch.float64), torch.zeros_like(e.grad, dtype=torch.float64)
    for objective in (plain, z_only):  # the gradient of a sum
        one = truth(problem, objective)
        exact += one.dE
        allowed += bound(problem, plan, objective).dE + one.radius.dE
    assert bool(((e.grad.double() - exact).abs() <= allowed).all()) and bool((exact.abs() > allowed).any())
    one = truth(problem, plain)
    assert abs(loss.detach().double() - one.value) <= bound(problem, plan, plain).value + one.radius.value
    own = F.cross_entropy(
        F.linear(e.double(), c.double(), bias.double()), targets, weight.double(), label_smoothing=0.1
    )
    assert abs(own.detach() - one.value) <= bound(problem, plan, plain).value  # what is translated is the same loss
