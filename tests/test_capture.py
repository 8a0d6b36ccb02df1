"""Captured heads: from a model, to a file and back, what is refused, and what the shipped ones are like."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cce_precision.analysis.capture import (
    DATA,
    STAGES,
    Capture,
    as_compact,
    capture,
    dequantise_rows,
    load_capture,
    load_shipped,
    quantise_rows,
)
from cce_precision.analysis.heads import HeadStatistics, head_statistics, statistics_table

N, V, D = 12, 37, 8
MEGABYTE = 1_000_000


class Toy(nn.Module):
    """The smallest causal language model that looks like one of the `transformers` library."""

    def __init__(self, bias: bool = False, softcap: float | None = None, **config: float) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(V, D)
        self.lm_head = nn.Linear(D, V, bias=bias)
        self.config = SimpleNamespace(final_logit_softcapping=softcap, **config)
        self.calls = 1
        self.factor = config.get("logit_scale", 1 / config.get("logits_scaling", 1.0))

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        x = torch.cumsum(self.embed(input_ids), dim=1)
        for _ in range(self.calls):
            logits = self.lm_head(x)
        logits = logits * self.factor
        if self.config.final_logit_softcapping is not None:
            cap = self.config.final_logit_softcapping
            logits = cap * torch.tanh(logits / cap)
        return {"logits": logits}


def ids(rows: int = 2, length: int = 7) -> Tensor:
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(1))


def loss_of(head: Capture) -> Tensor:
    logits = head.e.double() @ head.c.double().T
    if head.bias is not None:
        logits = logits + head.bias.double()
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return nn.functional.cross_entropy(logits, head.targets)


def toy_capture(**changes: object) -> Capture:
    torch.manual_seed(0)
    values: dict[str, object] = {"e": torch.randn(N, D), "c": torch.randn(V, D), "targets": torch.arange(N)}
    return Capture(**(values | changes))  # type: ignore[arg-type]


# -- from a model


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("config", [{}, {"logit_scale": 0.0625}, {"logit_scale": 0.3}, {"logits_scaling": 3.0}])
def test_a_captured_head_has_the_models_own_loss(bias: bool, softcap: float | None, config: dict[str, float]) -> None:
    model, tokens = Toy(bias, softcap, **config), ids()
    head = capture(model, {"input_ids": tokens})
    logits = model(tokens)["logits"][:, :-1].double()
    truth = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    size = float(head.e.abs().max() * head.c.abs().sum(dim=1).max()) + bias  # bounds every logit
    assert abs(float(loss_of(head)) - float(truth.detach())) <= 2 * (D + 6) * 2.0**-23 * size
    assert head.e.shape == (12, D) and head.softcap == softcap and (head.bias is not None) == bias
    assert head.metadata["checked"].startswith("against")


def test_the_kinds_of_batch_agree() -> None:
    model, tokens = Toy(), ids()
    heads = [capture(model, batch) for batch in (tokens, (tokens, tokens), {"input_ids": tokens, "labels": tokens})]
    aligned = capture(model, (tokens, tokens.roll(-1, 1)), shift=False)
    assert all(torch.equal(heads[0].e, head.e) and torch.equal(heads[0].targets, head.targets) for head in heads)
    assert len(aligned.e) == 14 and torch.equal(aligned.targets[:6], heads[0].targets[:6])


def test_ignored_and_padded_positions_are_dropped() -> None:
    tokens, mask = ids(), torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    labels = tokens.clone()
    labels[0, :3] = -100
    head = capture(Toy(), {"input_ids": tokens, "labels": labels, "attention_mask": mask})
    assert torch.equal(head.targets, torch.cat((tokens[0, 3:], tokens[1, 1:4])))


def test_a_plain_module_names_its_head_and_keeps_its_mode() -> None:
    model = nn.Sequential(nn.Embedding(V, D), nn.Dropout(0.5), nn.Linear(D, V)).train()
    head = capture(model, ids(), head="2")
    assert head.c.shape == (V, D) and head.bias is not None and model.training and not model[2]._forward_hooks
    assert not head.e.requires_grad and head.c.data_ptr() != model[2].weight.data_ptr()


def test_what_cannot_be_captured_says_why() -> None:
    def refused(words: str, model: nn.Module, batch: object = None, **options: object) -> None:
        with pytest.raises(ValueError, match=words):
            capture(model, ids() if batch is None else batch, **options)  # type: ignore[arg-type]

    plain = nn.Sequential(nn.Embedding(V, D), nn.Linear(D, V))
    refused("name it with head=", plain)
    refused("head is 'lm_head', not a module of the model; its linear modules: 1", plain, head="lm_head")
    refused(r"no float weight \(V, D\)", nn.Sequential(nn.Embedding(V, D), nn.ReLU()), head="1")
    refused("neither 'labels' nor 'input_ids'", Toy(), {"x": ids()})
    refused("batch is a str", Toy(), "text")
    refused("the head saw rows of shape", Toy(), (ids(), ids(2, 5)))
    fused, twice, scaled = Toy(), Toy(), Toy()
    fused.calls, twice.calls, scaled.factor = 0, 2, 0.5
    fused.forward = lambda tokens: {"loss": torch.zeros(())}  # type: ignore[assignment]
    refused("called 0 times", fused)
    refused("called 2 times", twice)
    refused("about 0.5 times as large", scaled)
    refused("softcap=0.1", Toy(softcap=2.0), softcap=0.1)
    assert capture(scaled, ids(), logit_scale=0.5).metadata["logit_scale"].startswith("0.5, folded")


def test_a_model_of_the_transformers_library() -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra `transformers`")
    shape = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = transformers.Gemma2Config(**shape, **heads, final_logit_softcapping=5.0, pad_token_id=0)
    tokens = ids()
    head = capture(transformers.Gemma2ForCausalLM(config), {"input_ids": tokens, "labels": tokens})
    assert head.softcap == 5.0 and head.c.shape == (V, 16) and head.metadata["checked"].startswith("against")


# -- files


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("extra", [False, True])
def test_a_file_reads_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype, extra: bool) -> None:
    more = {"bias": torch.randn(V), "softcap": 30.1, "metadata": {"model": "toy"}} if extra else {}
    head = toy_capture(**more).to(dtype)
    head.save(tmp_path / "head.safetensors")
    again = load_capture(tmp_path / "head.safetensors")
    assert again.softcap == head.softcap and again.metadata == head.metadata and again.e.dtype == dtype
    for one, other in ((head.e, again.e), (head.c, again.c), (head.targets, again.targets)):
        assert torch.equal(one, other)
    assert again.bias is head.bias is None or torch.equal(again.bias, head.bias)  # type: ignore[arg-type]


def test_a_compact_file_is_what_as_compact_says(tmp_path: Path) -> None:
    head = toy_capture(c=torch.cat((torch.randn(V - 1, D), torch.zeros(1, D))))
    head.save(tmp_path / "head.safetensors", compact=True)
    again, expected = load_capture(tmp_path / "head.safetensors"), as_compact(head)
    assert torch.equal(again.c, expected.c) and torch.equal(again.e, expected.e) and again.c.dtype == torch.bfloat16
    codes, scale = quantise_rows(head.c)
    assert int(codes.abs().max()) == 127 and not again.c[-1].any()
    limit = scale[:, None] * (0.5 + 127 * 2.0**-8)  # half a step, and the rounding to bfloat16
    assert bool(((dequantise_rows(codes, scale) - head.c).abs() <= limit).all())


def test_softcap_may_stand_in_the_metadata_and_targets_may_be_short(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    tensors = {"e": torch.randn(N, D), "c": torch.randn(V, D), "targets": torch.arange(N, dtype=torch.int16)}
    save_file(tensors, path, {"softcap": "30.5"})
    assert load_capture(path).softcap == 30.5 and load_capture(path).targets.dtype == torch.int64


BAD: list[tuple[str, dict[str, Tensor | None]]] = [
    ("tensor 'targets' is missing.*present: c, e", {"targets": None}),
    ("tensor 'e' is missing", {"e": None}),
    ("tensor 'weight' is not known; allowed are", {"weight": torch.zeros(1)}),
    (r"tensor 'e' has shape \(2, 6, 8\), expected \(N, D\)", {"e": torch.zeros(2, 6, D)}),
    ("tensor 'c' has dtype torch.float64, allowed are torch.float32", {"c": torch.zeros(V, D, dtype=torch.float64)}),
    ("tensor 'e' has width 7, tensor 'c' has width 8", {"e": torch.zeros(N, 7)}),
    ("tensor 'e' holds NaN or infinite", {"e": torch.full((N, D), math.nan)}),
    ("tensor 'c' holds NaN or infinite", {"c": torch.full((V, D), math.inf)}),
    ("tensor 'targets' has 11 entries, tensor 'e' has 12 rows", {"targets": torch.zeros(11, dtype=torch.int64)}),
    ("tensor 'targets' has dtype torch.float32, allowed are torch.int64", {"targets": torch.zeros(N)}),
    ("tensor 'targets' holds 37, allowed are 0 to 36 and -100", {"targets": torch.full((N,), V)}),
    (r"tensor 'targets' has shape \(12, 1\)", {"targets": torch.zeros(N, 1, dtype=torch.int64)}),
    ("tensor 'bias' has 5 entries, tensor 'c' has 37 rows", {"bias": torch.zeros(5)}),
    (r"tensor 'softcap' has shape \(2,\), expected one number", {"softcap": torch.ones(2)}),
    ("softcap is 0.0, expected a positive", {"softcap": torch.zeros(())}),
    ("holds both 'c' and 'c_int8'", {"c_int8": torch.zeros(V, D, dtype=torch.int8)}),
    ("tensor 'c_scale' is missing", {"c": None, "c_int8": torch.zeros(V, D, dtype=torch.int8)}),
    ("tensor 'c_int8' is torch.float32", {"c": None, "c_int8": torch.zeros(V, D)}),
]


@pytest.mark.parametrize(("words", "changes"), BAD, ids=[words[:40] for words, _ in BAD])
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path: Path, words: str, changes: dict[str, Tensor | None]) -> None:
    tensors: dict[str, Tensor | None] = {"e": torch.zeros(N, D), "c": torch.zeros(V, D), "targets": torch.arange(N)}
    path = tmp_path / "bad.safetensors"
    save_file({name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}, path)
    with pytest.raises(ValueError, match=words) as caught:
        load_capture(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.safetensors: no such file"):
        load_capture(tmp_path / "missing.safetensors")
    (tmp_path / "text.safetensors").write_text("not tensors")
    with pytest.raises(ValueError, match=r"text\.safetensors: not a readable safetensors file"):
        load_capture(tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match="stage is 'final', known are initial, early, trained"):
        load_shipped("final")


# -- statistics


def by_definition(head: Capture) -> HeadStatistics:
    """The statistics written out with whole matrices and none of the code under test."""
    e, c = head.e.double(), head.c.double()
    z = e @ c.T if head.bias is None else e @ c.T + head.bias.double()
    z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
    p, (n, v) = z.softmax(dim=1), z.shape
    d, p_t = p - nn.functional.one_hot(head.targets, v), p[torch.arange(n), head.targets]
    groups = [slice(i, i + 128) for i in range(0, n, 128)]

    def over(threshold: Callable[[float], float]) -> dict[str, float]:
        return {f"2^-{k}": threshold(2.0**-k) for k in (12, 14, 16)}

    def tiles(order: Tensor) -> float:
        found = [bool((d[g][:, order[j : j + 128]].abs() >= 2.0**-12).any()) for g in groups for j in range(0, v, 128)]
        return sum(found) / len(found)

    def columns(eps: float) -> float:
        return sum(float((p[g] >= eps).any(dim=0).double().mean()) for g in groups) / len(groups)

    def blocks(eps: float) -> float:
        return sum(int((p[:, j : j + 32] >= eps).any(dim=1).sum()) for j in range(0, v, 32)) / n

    return HeadStatistics(
        tokens=n,
        vocabulary=v,
        width=c.shape[1],
        loss=float(nn.functional.cross_entropy(z, head.targets)),
        entropy=float(torch.distributions.Categorical(probs=p).entropy().mean()),
        p_target=float(p_t.mean()),
        entries=over(lambda eps: float((p >= eps).sum()) / n),
        mass_below=over(lambda eps: float(p[p < eps].sum()) / n),
        columns=over(columns),
        blocks=over(blocks),
        tiles_by_id=tiles(torch.arange(v)),
        tiles_by_mean_logit=tiles(z.mean(dim=0).argsort(descending=True)),
        flushed=float((p < 2.0**-12 / v * (1 - p_t)[:, None]).double().scatter(1, head.targets[:, None], 0.0).mean()),
        e_max=float(e.abs().max()),
        e_rms=float((e**2).mean() ** 0.5),
    )


def assert_close(found: dict[str, object], expected: dict[str, object], ulps: float) -> None:
    """Every number of two cards agrees to so many units of fp64 round-off."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_close(found[name], value, ulps)  # type: ignore[arg-type]
        else:
            assert abs(found[name] - value) <= ulps * 2.0**-53 * (1 + abs(value)), name  # type: ignore[operator]


@pytest.mark.parametrize("options", [{}, {"bias": 3 * torch.ones(300).cumsum(0) / 300}, {"softcap": 4.0}])
def test_statistics_are_what_their_definition_says(options: dict[str, object]) -> None:
    torch.manual_seed(5)
    head = toy_capture(e=3 * torch.randn(200, D), c=torch.randn(300, D), targets=torch.randint(300, (200,)), **options)
    found = head_statistics(head.e, head.c, head.targets, head.bias, head.softcap)
    largest = float(head.e.double().abs().max() * head.c.double().abs().sum(dim=1).max()) + 3
    assert_close(asdict(found), asdict(by_definition(head)), 300 * largest)
    assert statistics_table({"one": found, "two": found}).row_count == 10


def test_statistics_leave_ignored_rows_out() -> None:
    head = toy_capture(e=torch.cat((torch.randn(6, D), torch.full((6, D), 1e30))))
    targets = torch.where(torch.arange(N) < 6, head.targets, -100)
    assert head_statistics(head.e, head.c, targets) == head_statistics(head.e[:6], head.c, targets[:6])
    with pytest.raises(ValueError, match="ignore every row"):
        head_statistics(head.e, head.c, torch.full((N,), -100))


# -- a training run


def tiny_run(folder: Path, **options: object) -> tuple[Path, Callable[[], None]]:
    """A folder to write to, and a function that trains a tiny model on made-up text and writes its heads there."""
    pytest.importorskip("tokenizers", reason="the training run needs the package tokenizers")
    from cce_precision.analysis import pretrain

    words = [f"word{i * i % 211}{'.' if i % 7 else chr(10)}" for i in range(6000)]
    text = folder / "text.txt"
    text.write_text(" ".join(words))
    shape = pretrain.Preset(300, 16, 32, 1, 32, 4, 1e-2, False, 64, 32, "compact", head_dim=16, warmup=4)

    def go() -> None:
        run, card = pretrain.pretrain([text], preset=shape, steps=12, checkpoint=folder / "checkpoint.pt", **options)
        pretrain.write(run, card, folder / "out")

    return folder / "out", go


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out, go = tiny_run(tmp_path_factory.mktemp("whole"))
    go()
    return out


def test_a_tiny_training_run_writes_what_it_measured_and_learns(trained: Path) -> None:
    out = trained
    stages = json.loads((out / "card.json").read_text())["stages"]
    assert [stages[name]["steps"] for name in STAGES] == [0, 2, 12]
    assert stages["trained"]["heldout_loss"] < stages["early"]["heldout_loss"] < stages["initial"]["heldout_loss"]
    for name in STAGES:
        head = load_capture(out / f"captured-{name}.safetensors")
        assert head.metadata["stage"] == name and head.c.shape == (300, 16)
        assert head_statistics(head.e, head.c, head.targets).as_dict() == stages[name]["statistics"]


def test_an_interrupted_run_goes_on_to_the_same_bits(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, go = tiny_run(tmp_path)
    from cce_precision.analysis import pretrain

    def interrupted(run: pretrain.Trainer) -> tuple[Tensor, Tensor]:
        if run.step == 7:
            raise KeyboardInterrupt
        return batch(run)

    batch = pretrain.Trainer.batch
    monkeypatch.setattr(pretrain.Trainer, "batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        go()
    monkeypatch.setattr(pretrain.Trainer, "batch", batch)
    go()
    for name in STAGES:
        one, other = (load_capture(folder / f"captured-{name}.safetensors") for folder in (trained, parts))
        assert torch.equal(one.e, other.e) and torch.equal(one.c, other.c) and torch.equal(one.targets, other.targets)


def test_text_loses_markup_and_repeated_lines(tmp_path: Path) -> None:
    from cce_precision.analysis import corpus

    page = "<html><head><title>t</title></head><body><h1>One&amp;two</h1><p>a  <b>bold</b>\n word<pre>x\n  y</pre>"
    assert corpus.strip_html(page) == "One&two\n\na bold word\nx\n  y"
    (tmp_path / "a.html").write_text("<p>the same long line, over and over<p>first")
    (tmp_path / "b.html").write_text("<p>the same long line, over and over<p>second")
    seen: set[bytes] = set()
    texts = [corpus._drop_repeats(text, seen) for text in corpus._read_files(tmp_path, ("*.html",))]
    assert texts[0].split() == ["the", "same", "long", "line,", "over", "and", "over", "first"] and texts[1] == "second"
    with pytest.raises(FileNotFoundError, match="gathers text"):
        corpus.read_text([tmp_path / "missing.txt"])
    with pytest.raises(ValueError, match="tier 'secret' is not known; allowed are public-domain, permissive"):
        corpus.gather(tmp_path, ["secret"])


def test_without_apt_the_error_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cce_precision.analysis import corpus

    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"apt-get was not found.*capture --train --text FILE"):
        corpus.gather(tmp_path)


# -- what is shipped


@pytest.fixture(scope="module")
def card() -> dict[str, dict]:
    if not (DATA / "card.json").exists():
        pytest.skip("the captured heads have not been made yet (cce-precision capture --train)")
    return json.loads((DATA / "card.json").read_text())


def test_the_shipped_files_are_small_and_documented(card: dict[str, dict]) -> None:
    assert sum(path.stat().st_size for path in DATA.iterdir()) <= 5 * MEGABYTE
    assert {f"captured-{stage}.safetensors" for stage in STAGES} <= {path.name for path in DATA.iterdir()}
    assert "public domain" in (DATA / "README.md").read_text()
    assert tuple(card["stages"]) == STAGES


@pytest.mark.parametrize("stage", STAGES)
def test_a_shipped_head_is_what_its_card_says(card: dict[str, dict], stage: str) -> None:
    head = load_shipped(stage)
    assert head.e.shape == (1024, 128) and head.c.shape == (8192, 128) and head.e.dtype == head.c.dtype
    found = head_statistics(head.e, head.c, head.targets)
    largest = float(head.e.double().abs().max() * head.c.double().abs().sum(dim=1).max())
    assert_close(asdict(found), card["stages"][stage]["statistics"], len(head.c) * largest)
