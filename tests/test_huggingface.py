"""`cce_patch` on models of transformers: class by class beside the unpatched model, and in everything that people do
with a model."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cce_precision import cce_counts, cce_patch, choosing, linear_cross_entropy, uncce_patch
from cce_precision.analysis.census import (
    GRADIENT_ALLOWED,
    LOSS_ALLOWED,
    calls_of_the_loss,
    check,
    difference,
    logits_of,
    step,
)
from cce_precision.analysis.census_configs import VOCABULARY, build, inputs
from cce_precision.huggingface import head as heads
from cce_precision.huggingface.logits import LazyLogits
from cce_precision.huggingface.patch import Patch

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

# The classes that between them have everything that stands between a head and a loss (the census has all of them).
CLASSES = {
    "llama": "",
    "gpt2": "tied",
    "gemma2": "tied softcap",  # softcap by division, tanh, product
    "gemma3_text": "tied",
    "nanochat": "softcap",  # softcap on fp32 logits
    "xlstm": "softcap",
    "cohere": "tied scale",
    "granite": "scale",
    "hyperclovax": "scale",  # multiplied
    "phi": "bias",
    "gptj": "bias",
    "bert": "tied bias",  # a loss of its own, bias in the decoder
    "xlm": "tied bias",
    "bigbird_pegasus": "",
    "prophetnet": "tied",  # log_softmax and nll_loss, tokens first
    "bart": "tied",  # labels that are not shifted
    "mixtral": "",
    "qwen3_moe": "",
    "mamba": "tied",
    "whisper": "tied",
    "gemma3": "tied",  # text under an image model
    "git": "bias",  # the image's tokens cut away
}


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="cce_patch:")
        yield


@pytest.fixture(autouse=True)
def _every_class_is_its_own_again() -> Any:
    yield
    for patches in list(Patch.living.values()):
        for patch in list(patches):
            patch.retire()


@pytest.fixture
def llama() -> Any:
    yield (model := build("llama"))
    uncce_patch(model)


def given(model: Any, model_type: str = "llama", **more: Any) -> dict[str, Any]:
    return inputs(model_type, model) | more


def near(ours: Tensor | float, theirs: Tensor | float, logits: Tensor) -> bool:
    """Whether two losses, of a batch or of each token, differ by no more than fp32 logits may make them."""
    one, other = torch.as_tensor(ours).detach(), torch.as_tensor(theirs).detach()
    allowed = LOSS_ALLOWED * other.abs().clamp(min=float(logits.detach().abs().max()))
    return one.shape == other.shape and bool(((one - other).abs() <= allowed).all())


# -- class by class ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model_type", "head"), CLASSES.items())
def test_a_patched_class_has_the_loss_and_gradients_of_the_unpatched_one(model_type: str, head: str) -> None:
    """Without any tensor of vocabulary width, and with the same logits when there are no labels (see `check`)."""
    row = check(model_type)
    assert (row.result, row.head) == ("passed", head), row.why


def _mutant(change: str) -> Any:
    def mutant(
        e: Tensor, c: Tensor, targets: Tensor, bias: Tensor | None, ignore_index: int, *args: Any, **kw: Any
    ) -> Any:
        softcap, *rest = args
        if change == "softcap":
            softcap = None
        if change == "bias":
            bias = None
        if change == "scale":
            kw["temperature"] = 1.0
        if change == "ignore_index":
            ignore_index, targets = -1, torch.where(targets == -100, 7, targets)
        loss = linear_cross_entropy(e, c, targets, bias, ignore_index, softcap, *rest, **kw)
        if change == "off":
            return loss * (1 + 1e-4)
        return loss.detach() + 0 * (e.sum() + c.sum()) if change == "zero gradient" else loss

    return mutant


@pytest.mark.parametrize(
    ("model_type", "change"),
    [
        ("llama", "off"), ("llama", "ignore_index"), ("llama", "zero gradient"),
        ("gemma2", "softcap"), ("granite", "scale"), ("phi", "bias"),
    ],
)  # fmt: skip
def test_a_wrong_loss_is_noticed(model_type: str, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "linear_cross_entropy", _mutant(change))
    assert check(model_type).result == "wrong"


def test_auxiliary_losses_stay() -> None:
    model = build("mixtral")
    model.config.output_router_logits = True
    model.router_aux_loss_coef = 0.7
    batch = given(model, output_router_logits=True)
    plain = model(**batch)
    fused = cce_patch(model)(**batch)
    assert fused.aux_loss == plain.aux_loss > 0
    assert near(fused.loss.item(), plain.loss.item(), plain.logits)
    uncce_patch(model)


def test_heads_that_are_not_linear_are_refused_by_name() -> None:
    for name in ("musicgen", "musicgen_melody"):
        row = check(name)
        assert row.result == "refused" and "ModuleList" in row.why
    with pytest.raises(TypeError, match="get_output_embeddings, got Linear"):
        cce_patch(nn.Linear(2, 3))
    model = build("llama")
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(TypeError, match=r"LlamaForCausalLM must be an nn\.Linear, got Sequential$"):
        cce_patch(model)
    model.lm_head = Scaled(32, VOCABULARY)
    with pytest.raises(TypeError, match=r"an nn\.Linear, got Scaled, which has a forward of its own$"):
        cce_patch(model)


class Scaled(nn.Linear):
    """A head that scales each token's logit, as Dory's does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.arange(1, self.out_features + 1)


# -- what a model is asked for -----------------------------------------------------------------------------------------


def test_logits_are_real_as_soon_as_somebody_reads_them(llama: Any) -> None:
    batch = given(llama)
    plain = llama(**batch).logits
    cce_patch(llama)
    logits = llama.train()(**batch).logits
    assert logits.shape == plain.shape and logits.dtype == plain.dtype and logits.device == plain.device
    assert cce_counts(llama).materialised == 0
    assert torch.equal(logits[:, -1].argmax(-1), plain[:, -1].argmax(-1))
    assert torch.equal(torch.softmax(logits, -1), torch.softmax(plain, -1))
    assert torch.equal(torch.cat([logits, logits]), torch.cat([plain, plain]))
    assert (logits - plain == 0).all() and len(logits) == len(plain)
    (llama(**batch).logits.sum() * 1).backward()
    assert llama.lm_head.weight.grad.abs().sum() > 0
    outside = llama(**batch).logits.float()[:, :-1].reshape(-1, VOCABULARY)
    loss = F.cross_entropy(outside, batch["labels"][:, 1:].reshape(-1))
    assert near(loss.item(), llama(**batch).loss.item(), plain)


def test_a_warning_names_what_needed_the_logits_once(llama: Any) -> None:
    def loss(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
        return torch.logsumexp(logits, -1).mean()

    llama.loss_function = loss
    batch = given(llama)
    theirs = llama(**batch).loss
    cce_patch(llama)
    with pytest.warns(UserWarning, match="LlamaForCausalLM for 'logsumexp'"):
        assert llama(**batch).loss == theirs
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llama(**batch)
    counts = cce_counts(llama)
    assert (counts.fused, counts.materialised, dict(counts.operations)) == (0, 2, {"logsumexp": 2})


def test_logits_of_a_model_that_has_learnt_since_are_refused(llama: Any) -> None:
    cce_patch(llama)
    out = llama.train()(**given(llama))
    out.loss.backward()
    torch.optim.SGD(llama.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match="optimizer step"):
        out.logits.sum()


def test_generation_and_calls_without_labels_are_what_they_were(llama: Any) -> None:
    prompt = given(llama)["input_ids"][:, :4]
    before = llama.generate(prompt, max_new_tokens=6, do_sample=False)
    logits = llama(prompt).logits
    cce_patch(llama)
    assert torch.equal(llama.generate(prompt, max_new_tokens=6, do_sample=False), before)
    out = llama(prompt)
    assert type(out.logits) is Tensor and torch.equal(out.logits, logits) and out.loss is None
    assert (cce_counts(llama).fused, cce_counts(llama).materialised) == (0, 0)


def test_the_perplexity_of_a_batch(llama: Any) -> None:
    """reduction="none": the loss of each token but the first, (B, T - 1), in eval mode."""
    batch = given(llama)
    labels = batch["labels"]
    logits = llama(**batch).logits[:, :-1]
    plain = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none").view(2, -1)
    assert cce_patch(llama, reduction="none") is llama
    for loss in (llama(**batch)[0], llama(**batch, num_items_in_batch=7).loss, llama(**batch, return_dict=False)[0]):
        assert loss.shape == (2, labels.shape[1] - 1)
        assert (loss[0, :3] == 0).all() and near(loss, plain, logits)
        perplexity = torch.exp(loss.sum(1) / (labels[:, 1:] != -100).count_nonzero(dim=1)).mean()
        assert perplexity > 1
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    assert torch.equal(llama(**batch, shift_labels=shifted).loss[:, :-1], llama(**batch).loss)
    assert llama(**batch, shift_labels=shifted).loss.shape == labels.shape
    assert cce_counts(llama).materialised == 0


def test_labels_that_a_model_does_not_shift_keep_their_shape() -> None:
    model = build("bart")
    batch = given(model, "bart")
    cce_patch(model, reduction="none")
    assert model(**batch).loss.shape == batch["labels"].shape
    uncce_patch(model)


def test_the_models_own_loss_arguments_hold(llama: Any) -> None:
    batch = given(llama)
    shifted = torch.randint(0, VOCABULARY, batch["labels"].shape)
    shifted[:, -3:] = 5
    variants: list[dict[str, Any]] = [
        {"num_items_in_batch": 37}, {"num_items_in_batch": torch.tensor(37)}, {"shift_labels": shifted},
        {"shift_labels": shifted, "ignore_index": 5}, {"logits_to_keep": batch["labels"].shape[1]},
    ]  # fmt: skip
    plain = [llama(**batch, **more) for more in variants]
    cce_patch(llama)
    for theirs, more in zip(plain, variants):
        assert near(llama(**batch, **more).loss.item(), theirs.loss.item(), theirs.logits), more
    cce_patch(llama, reduction="sum")
    kept = (batch["labels"][:, 1:] != -100).sum()
    theirs = uncce_patch(copy.deepcopy(llama))(**batch)
    assert near(llama(**batch, num_items_in_batch=3).loss.item() / kept, theirs.loss.item(), theirs.logits)
    counts = cce_counts(llama)
    assert (counts.fused, counts.materialised) == (1, 0)


def test_train_only_and_return_logits(llama: Any) -> None:
    batch = given(llama)
    cce_patch(llama, train_only=True)
    assert type(llama.eval()(**batch).logits) is Tensor and cce_counts(llama).fused == 0
    assert type(llama.train()(**batch).logits) is LazyLogits and cce_counts(llama).fused == 1
    cce_patch(llama, return_logits=False)
    assert llama(**batch).logits is None and llama(**batch, return_dict=False)[1:] is not None
    assert llama(batch["input_ids"]).logits is not None


def test_options_reach_the_loss(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        heads, "linear_cross_entropy", lambda *a, **kw: seen.update(kw) or linear_cross_entropy(*a, **kw)
    )
    cce_patch(llama, impl="cce", filter_eps=1e-4, accum_c_fp32=True, filter_e_grad=False, backend="eager")
    llama(**given(llama))
    wanted = {"impl": "cce", "filter_eps": 1e-4, "accum_c_fp32": True, "filter_e_grad": False, "backend": "eager"}
    assert wanted.items() <= seen.items()


# What the choice depends on: options, reduction, bias, softcap, and the dtype under autocast.
AUTOMATIC: list[tuple[str, dict[str, Any], torch.dtype | None]] = [
    ("llama", {}, None),
    ("llama", {"tolerance": 2e-6}, None),
    ("llama", {"reduction": "sum", "accum_e_fp32": True, "workspace_mb": 1}, None),
    ("gemma2", {"tolerance": 2e-6}, None),
    ("phi", {"tolerance": 4e-3}, torch.bfloat16),
]


@pytest.mark.parametrize(("model_type", "options", "cast"), AUTOMATIC, ids=str)
def test_the_automatic_choice_is_that_of_the_function_and_told(
    model_type: str, options: dict[str, Any], cast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(model_type)
    batch = given(model, model_type)
    plain, logits = step(model, batch), logits_of(model, batch)
    asked: list[tuple[Any, ...]] = []
    resolve = choosing.resolve
    monkeypatch.setattr(choosing, "resolve", lambda *call: asked.append(call) or resolve(*call))
    with torch.autocast("cpu", cast, enabled=cast is not None):
        ours = step(cce_patch(model, impl="auto", **options), batch)
        (call,) = asked
        chosen = resolve(*call)
        assert cce_counts(model).impls == {chosen.impl: 1} and cce_counts(model).materialised == 0
        named = options | {"impl": chosen.impl, "workspace_mb": chosen.workspace_mb, "tolerance": None}
        with calls_of_the_loss(seen := []):
            again = step(cce_patch(model, **named), batch)
        linear_cross_entropy(**seen[0] | options | {"impl": "auto", "workspace_mb": options.get("workspace_mb")})
    assert asked == [call, call], "what the function itself takes"
    assert ours.loss == again.loss and all(torch.equal(x, again.gradients[k]) for k, x in ours.gradients.items())
    if cast is None:
        tokens = int((batch["labels"][:, 1:] != -100).sum()) if "reduction" in options else 1
        assert near(ours.loss / tokens, plain.loss, logits)
        mean = {name: x / tokens for name, x in ours.gradients.items()}
        assert difference(mean, plain.gradients) <= GRADIENT_ALLOWED  # a zero gradient is off by 1
    uncce_patch(model)


def test_a_demand_that_no_variant_meets_is_said(llama: Any) -> None:
    cce_patch(llama, impl="auto", tolerance=1e-9)
    with pytest.raises(ValueError, match="impl='auto' finds no variant.*the nearest is"):
        llama(**given(llama))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "said"),
    [
        (["lama"], {}, ValueError, "did you mean 'llama'"),
        ([3], {}, TypeError, "got 3 of type int"),
        (["llama"], {"impl": "cces"}, ValueError, "did you mean"),
        (["llama"], {"reduction": "max"}, ValueError, "reduction must be"),
        (["llama"], {"softcap": 3.0}, TypeError, "unknown option 'softcap'"),
        (["llama"], {"filter_eps": 0.1}, ValueError, "filters nothing"),
        (["llama"], {"workspace_mb": -1}, ValueError, "workspace_mb must be"),
    ],
)
def test_bad_arguments_are_named_when_patching(
    arguments: list[Any], options: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        cce_patch(*arguments, **options)


# -- classes, copies, and back -----------------------------------------------------------------------------------------


def test_a_patched_class_patches_its_models_and_comes_back(tmp_path: Path) -> None:
    cls = transformers.LlamaForCausalLM
    own = (cls.__dict__["forward"], cls.__dict__["__init__"])
    build("llama").save_pretrained(tmp_path)
    for thing in ("llama", cls, build("llama").config):
        assert cce_patch(thing) is cls
        for model in (cls.from_pretrained(tmp_path), cls(build("llama").config)):
            model(**given(model))
            assert cce_counts(model).fused >= 1
        uncce_patch(model)  # of one model alone
        model(**given(model))
        assert cce_counts("llama").fused == 2
        with pytest.raises(ValueError, match="not patched"):
            cce_counts(model)
        assert uncce_patch(thing) is cls
        assert (cls.__dict__["forward"], cls.__dict__["__init__"]) == own
        with pytest.raises(ValueError, match="not patched"):
            cce_counts(cls)


def test_a_model_comes_back(llama: Any) -> None:
    cls, own, batch = type(llama), type(llama).__dict__["forward"], given(llama)
    plain = llama(**batch)
    cce_patch(llama)
    other = build("llama")
    assert type(other(**batch).logits) is Tensor, "one model is patched, not its class"
    cce_patch(llama, impl="cce_no_filter")  # patched again: the newer options
    assert cce_counts(llama).fused == 0
    assert uncce_patch(llama) is llama
    assert cls.__dict__["forward"] is own and not llama.lm_head._forward_pre_hooks
    assert torch.equal(llama(**batch).loss, plain.loss)
    uncce_patch(llama)


def test_a_loss_that_is_somebody_elses_is_said_once(llama: Any) -> None:
    own, batch = llama.forward, given(llama)
    cce_patch(llama)
    llama.forward = lambda **inputs: build("llama")(**inputs)
    with pytest.warns(UserWarning, match="somebody has replaced the forward since, so the loss of LlamaForCausalLM"):
        llama(**batch)
    cce_patch(llama)  # after them: it runs, but the head is not called
    with pytest.warns(UserWarning, match="does not call the head"):
        llama(**batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llama(**batch)
        uncce_patch(llama)
        llama.forward = own
        cce_patch(llama)(**batch)
    assert cce_counts(llama).fused == 1


@pytest.mark.slow
def test_copies_and_pickles_are_patched_too(llama: Any, tmp_path: Path) -> None:
    batch = given(llama)
    cce_patch(llama, return_logits=False)
    loss = llama(**batch).loss
    stored = io.BytesIO()
    torch.save(llama, stored)
    stored.seek(0)
    for twin in (copy.deepcopy(llama), pickle.loads(pickle.dumps(llama)), torch.load(stored, weights_only=False)):
        out = twin(**batch)
        assert out.logits is None and torch.equal(out.loss, loss) and cce_counts(twin).fused == 1
        uncce_patch(twin)
    (tmp_path / "model").write_bytes(stored.getvalue())
    code = (
        "import sys, torch, cce_precision.huggingface; from cce_precision import cce_counts\n"
        "assert 'transformers' not in sys.modules\n"
        "m = torch.load(sys.argv[1], weights_only=False); ids = torch.arange(5, 15)[None]\n"
        "m(ids, labels=ids); assert cce_counts(m).fused == 1"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "model"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    del twin, out
    gc.collect()


def test_lazy_logits_are_pickled_and_copied_as_real_ones(llama: Any) -> None:
    cce_patch(llama)
    out = llama.train()(**given(llama))
    stored = pickle.loads(pickle.dumps(out.logits))
    assert type(stored) is Tensor and torch.equal(stored, out.logits.detach())
    assert type(copy.deepcopy(out.logits)) is Tensor


def test_a_resized_head_is_patched(llama: Any) -> None:
    cce_patch(llama)
    llama.resize_token_embeddings(VOCABULARY + 6)
    out = llama(**given(llama))
    assert out.logits.shape[-1] == VOCABULARY + 6 and cce_counts(llama).fused == 1
    theirs = uncce_patch(copy.deepcopy(llama))(**given(llama))
    assert near(out.loss.item(), theirs.loss.item(), theirs.logits)


def test_data_parallel_replicas_are_refused(llama: Any) -> None:
    cce_patch(llama)
    llama._is_replica = True
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        llama(**given(llama))


def test_autocast_gives_16_bit_logits_and_an_fp32_loss(llama: Any) -> None:
    batch = given(llama)
    truth = llama(**batch).loss.item()
    with torch.autocast("cpu", torch.bfloat16):
        theirs = llama(**batch)
        ours = cce_patch(llama)(**batch)
    assert ours.logits.dtype == theirs.logits.dtype == torch.bfloat16 and ours.loss.dtype == torch.float32
    assert torch.equal(ours.logits.detach(), theirs.logits)
    bf16 = torch.finfo(torch.bfloat16).eps
    assert abs(ours.loss.item() - theirs.loss.item()) <= bf16 * theirs.logits.abs().max() and ours.loss != truth
