"""`cce_patch` with the tools of the field: Trainer, torch.compile, PEFT, accelerate, FSDP2 and DDP, TRL, Lightning,
other releases of transformers. What is not installed is skipped, saying so."""

from __future__ import annotations

import copy
import gc
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cce_precision import cce_counts, cce_patch, uncce_patch
from cce_precision.analysis.census import GRADIENT_ALLOWED, UNIT, difference, page, read, step
from cce_precision.analysis.census_configs import VOCABULARY, build, inputs
from cce_precision.huggingface.logits import LazyLogits
from tests.test_huggingface import given, near

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="cce_patch:")
        yield


@pytest.fixture
def llama() -> Any:
    yield (model := build("llama"))
    uncce_patch(model)


def movement(model: Any, start: Any) -> dict[str, Tensor]:
    old = dict(start.named_parameters())
    return {name: p.detach() - old[name].detach() for name, p in model.named_parameters()}


def apart(ours: Any, theirs: Any, start: Any) -> float:
    """How far one optimizer step of two copies is apart, relative to it; infinite where the second did not move."""
    moved = movement(theirs, start)
    norm = sum(float(x.square().sum()) for x in moved.values()) ** 0.5
    weights = sum(float(p.detach().square().sum()) for p in start.parameters()) ** 0.5
    return max(difference(movement(ours, start), moved) - UNIT * weights / max(norm, 1e-30), 0.0)


def trained(model: Any, folder: Path, **arguments: Any) -> tuple[Any, dict[str, float]]:
    """The model after one optimizer step of the Trainer over two accumulated batches, and its evaluation."""
    batch = given(model)
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in zip(batch["input_ids"], batch["labels"])] * 2

    def metrics(prediction: Any) -> dict[str, float]:
        assert prediction.predictions.shape == (4, *batch["labels"].shape[1:], VOCABULARY)
        return {"logits": float(abs(prediction.predictions).sum())}

    options = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=0.5, lr_scheduler_type="constant", max_grad_norm=0.0, optim="sgd", weight_decay=0.0,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, **arguments,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model, args=options, train_dataset=rows, eval_dataset=rows, compute_metrics=metrics
    )
    trainer.train()
    return model, trainer.evaluate()


@pytest.mark.parametrize("arguments", [{}, {"gradient_checkpointing": True}, {"bf16": True}], ids=str)
def test_the_trainer_accumulates_checkpoints_and_evaluates(arguments: dict[str, Any], tmp_path: Path) -> None:
    start = build("llama").train()
    plain, theirs = trained(copy.deepcopy(start), tmp_path, **arguments)
    ours_model = cce_patch(copy.deepcopy(start))
    patched, ours = trained(ours_model, tmp_path, **arguments)
    counts = cce_counts(patched)
    assert counts.fused == 3 and set(counts.operations) == {"detach"}, "two batches, and one of evaluation"
    allowed = 4 * torch.finfo(torch.bfloat16).eps if "bf16" in arguments else GRADIENT_ALLOWED
    assert apart(patched, plain, start) <= allowed < 1, "and no zero gradient"
    assert abs(ours["eval_loss"] - theirs["eval_loss"]) <= allowed * theirs["eval_logits"]
    uncce_patch(patched)


def test_a_loss_only_evaluation_makes_no_logits(tmp_path: Path) -> None:
    model = cce_patch(build("llama"))
    batch = given(model)
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in zip(batch["input_ids"], batch["labels"])]
    options = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, prediction_loss_only=True
    )
    transformers.Trainer(model=model, args=options, eval_dataset=rows).evaluate()
    assert (cce_counts(model).fused, cce_counts(model).materialised) == (1, 0)
    uncce_patch(model)


def test_accelerate_accumulates(llama: Any) -> None:
    """The gradients of two micro-batches that `Accelerator.accumulate` adds up before the step."""
    accelerate = pytest.importorskip("accelerate")
    batch = {name: x for name, x in given(llama).items() if isinstance(x, Tensor)}
    parts = [{name: x[i : i + 1] for name, x in batch.items()} for i in range(2)]
    stepped = []
    accelerate.state.AcceleratorState._reset_state(True)  # another test's precision
    for model in (copy.deepcopy(llama), cce_patch(copy.deepcopy(llama))):
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="no", gradient_accumulation_steps=2)
        prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
        for part in parts:
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(**part).loss)
                optimizer.step()
                optimizer.zero_grad()
        stepped.append(model)
    plain, patched = stepped
    accelerate.state.AcceleratorState._reset_state(True)
    assert (cce_counts(patched).fused, cce_counts(patched).materialised) == (2, 0)
    assert apart(patched, plain, llama) <= GRADIENT_ALLOWED
    uncce_patch(patched)


def test_a_compiled_model_is_one_graph() -> None:
    model = build("gemma2").train()
    batch = given(model, "gemma2")
    theirs = step(model, batch)
    cce_patch(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    model.zero_grad()
    out = compiled(**batch)
    out.loss.backward()
    assert difference({name: p.grad for name, p in model.named_parameters()}, theirs.gradients) <= GRADIENT_ALLOWED
    assert type(out.logits) is LazyLogits and near(out.loss.item(), theirs.loss, out.logits)
    assert type(compiled.eval()(**batch).logits) is Tensor
    uncce_patch(model)
    torch._dynamo.reset()


def test_low_rank_adapters(llama: Any) -> None:
    peft = pytest.importorskip("peft")
    attention = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    batch = given(llama)
    for config in (attention, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])):
        torch.manual_seed(0)
        plain = peft.get_peft_model(copy.deepcopy(llama), config)
        theirs = step(plain, batch)
        for patched in (cce_patch(copy.deepcopy(plain)), None):
            if patched is None:  # the other order
                torch.manual_seed(0)
                patched = peft.get_peft_model(cce_patch(copy.deepcopy(llama)), config)
            ours = step(patched, batch)
            assert cce_counts(patched).fused == 1 and theirs.gradients
            assert difference(ours.gradients, theirs.gradients) <= GRADIENT_ALLOWED
            uncce_patch(patched)
    merged = cce_patch(peft.get_peft_model(copy.deepcopy(llama), attention).merge_and_unload())
    merged(**batch)
    assert cce_counts(merged).fused == 1


def test_an_adapter_on_the_head_is_refused(llama: Any) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["lm_head"], r=4)
    with pytest.raises(TypeError, match="modules_to_save"):
        cce_patch(peft.get_peft_model(copy.deepcopy(llama), config))
    late = peft.get_peft_model(cce_patch(llama), config)
    with pytest.raises(TypeError, match="modules_to_save"):
        late(**given(llama))


@pytest.mark.parametrize("order", ["patch first", "hooks first"])
def test_weights_that_are_offloaded(llama: Any, order: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    batch = given(llama)
    theirs = llama(**batch)
    if order == "patch first":
        cce_patch(llama)
    accelerate.cpu_offload(llama, execution_device="cpu")
    if order == "hooks first":
        cce_patch(llama)
    out = llama(**batch)
    assert near(out.loss.item(), theirs.loss.item(), theirs.logits)
    assert (cce_counts(llama).fused, cce_counts(llama).materialised) == (1, 0)
    uncce_patch(llama)
    assert torch.equal(llama(**batch).loss, theirs.loss)


# -- what is no dependency of the tests --------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["model first", "class first", "trainer first", "adapter", "bf16"])
def test_the_sft_trainer_of_trl(order: str, tmp_path: Path) -> None:
    """From 1.16 its loss is made of log-probabilities by token, which it gives the model a forward for."""
    trl = pytest.importorskip("trl", minversion="1.16", reason="TRL is not installed, or older than 1.16")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    start = build("llama").train()
    ids = inputs("llama", start)["input_ids"]
    rows = datasets.Dataset.from_list([{"input_ids": row.tolist()} for row in ids.repeat(2, 1)])
    if order == "adapter":
        peft = pytest.importorskip("peft")
        start = peft.get_peft_model(start, peft.LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False))

    def run(model: Any, late: bool = False) -> tuple[Any, dict[str, float]]:
        arguments = trl.SFTConfig(
            output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            learning_rate=0.5, lr_scheduler_type="constant", max_grad_norm=0.0, optim="sgd", report_to=[],
            save_strategy="no", use_cpu=True, disable_tqdm=True, bf16=order == "bf16", logging_steps=1,
            dataset_kwargs={"skip_prepare_dataset": True}, gradient_checkpointing=order != "adapter",
        )  # fmt: skip
        trainer = trl.SFTTrainer(
            model=model, args=arguments, train_dataset=rows, eval_dataset=rows,
            processing_class=tokenizer(tmp_path / "tokenizer"),
        )  # fmt: skip
        if late:
            cce_patch(model)
        trainer.train()
        told = trainer.state.log_history[0] | trainer.evaluate()
        return model, {name: x for name, x in told.items() if name.endswith(("loss", "entropy", "accuracy"))}

    plain, theirs = run(copy.deepcopy(start))
    model = copy.deepcopy(start)
    if order != "trainer first":
        cce_patch(type(model) if order == "class first" else model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="cce_patch:")
        patched, ours = run(model, late=order == "trainer first")
    counts = copy.copy(cce_counts(patched))
    uncce_patch(type(model) if order == "class first" else model)
    assert (counts.fused, counts.materialised) == (3, 0), "two batches, and one of evaluation"
    allowed = 4 * torch.finfo(torch.bfloat16).eps if order == "bf16" else GRADIENT_ALLOWED
    assert apart(patched, plain, start) <= allowed < 1, "and no zero gradient"
    assert len(theirs) >= 6
    for name, x in theirs.items():  # in bf16 the most likely token may be another
        assert abs(ours[name] - x) <= allowed * abs(x) or (order == "bf16" and name.endswith("accuracy"))


SCALES = {"llama": "", "phi": "bias", "gemma2": "softcap", "cohere": "scale", "granite": "scale", "mixtral": "aux loss"}


@pytest.mark.parametrize("model_type", SCALES)
def test_a_fused_head_of_trl(model_type: str) -> None:
    """Its fields, loss and gradients, those of the entropies too, are the fused head's own, at any temperature."""
    pytest.importorskip("trl", minversion="1.16", reason="TRL is not installed, or older than 1.16")
    from trl.trainer import utils as head

    start = build(model_type).train()
    start.config.output_router_logits = model_type == "mixtral"
    labels = (ids := inputs(model_type, start)["input_ids"]).clone()
    labels[0, :4] = -100
    fields = ("log_probs", "entropy", "is_top1", "label_mask", "loss", "aux_loss")
    found: list[tuple[Any, dict[str, Tensor]]] = []
    shifted: list[Tensor] = []
    for patch in (False, True):
        model = copy.deepcopy(start)
        if patch:
            cce_patch(model)
        head.add_fused_lm_head(model, 0.7, outputs=fields[:3])
        out = model(input_ids=ids, labels=labels, fused_lm_head=True, num_items_in_batch=torch.tensor(40))
        (out.loss + 0.1 * out.entropy.sum()).backward()
        parts = {"input_ids": ids, "labels": None, "shift_labels": labels, "fused_lm_head": True}
        shifted.append(model(**parts).log_probs)
        found.append((out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (theirs, _), (ours, gradients) = found
    plain = start(input_ids=ids)
    logits = plain.logits[:, :-1].double() / 0.7
    assert (cce_counts(model).fused, cce_counts(model).materialised) == (2, 0)
    assert near(shifted[1], shifted[0], logits) and shifted[1].shape == labels.shape
    for name in fields:
        one, other = getattr(ours, name), getattr(theirs, name)
        assert (one is None) == (other is None) == (name == "aux_loss" and model_type != "mixtral")
        if other is not None:
            assert one.shape == other.shape and near(one.float(), other.float(), logits)
    # Under a softcap TRL's gradient is further from the truth than allowed: judged by a loss in fp64.
    log_p = logits.log_softmax(-1)[ours.label_mask]
    nll = -log_p.gather(-1, labels[:, 1:][ours.label_mask][:, None]).sum()
    aux = start.config.router_aux_loss_coef * plain.aux_loss if model_type == "mixtral" else 0.0
    (nll / 40 + aux - 0.1 * (log_p.exp() * log_p).sum()).backward()
    truth = {name: p.grad for name, p in start.named_parameters() if p.grad is not None}
    assert difference(gradients, truth) <= GRADIENT_ALLOWED
    assert type(model(input_ids=ids, labels=labels).logits) is LazyLogits, "an ordinary call is what it was"
    uncce_patch(model)
    for freed in (start, model):
        head.add_fused_lm_head(freed)
    losses = [freed(input_ids=ids, labels=labels, fused_lm_head=True).loss for freed in (start, model)]
    assert torch.equal(*losses)


def test_what_a_fused_head_of_trl_cannot_have_raises(llama: Any) -> None:
    pytest.importorskip("trl", minversion="1.16", reason="TRL is not installed, or older than 1.16")
    from trl.trainer import utils as head

    ids = inputs("llama", llama)["input_ids"]
    with pytest.raises(NotImplementedError, match="needs mean_logits from its fused head"):
        head.add_fused_lm_head(cce_patch(copy.deepcopy(llama)), outputs=("log_probs", "mean_logits"))
    head.add_fused_lm_head(cce_patch(llama, reduction="sum"))
    with pytest.raises(ValueError, match="reduction='mean', got 'sum'"):
        llama(input_ids=ids, labels=ids, fused_lm_head=True)
    uncce_patch(llama)
    theirs = llama.forward
    llama.forward = lambda **given: theirs(**given)  # what accelerate does in train()
    with pytest.raises(RuntimeError, match=r"before trainer.train\(\)"):
        cce_patch(llama)(input_ids=ids, labels=ids, fused_lm_head=True)


def tokenizer(folder: Path) -> Any:
    """A tokenizer of numbered words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(VOCABULARY - 3)} | {"<pad>": VOCABULARY - 3, "<s>": VOCABULARY - 2}
    words |= {"</s>": VOCABULARY - 1}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def test_a_lightning_module(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="Lightning is not installed")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.5)

    start = build("llama").train()
    batch = {name: x for name, x in inputs("llama", start).items() if isinstance(x, Tensor)}
    models = [copy.deepcopy(start), cce_patch(copy.deepcopy(start))]
    for model in models:
        trainer = lightning.Trainer(
            max_steps=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(Module(model), torch.utils.data.DataLoader([batch], batch_size=None))
    assert cce_counts(models[1]).fused == 1
    assert apart(models[1], models[0], start) <= GRADIENT_ALLOWED
    uncce_patch(models[1])


@pytest.mark.parametrize("order", ["patch first", "shard first"])
def test_a_head_that_fsdp_shards_apart(order: str, tmp_path: Path) -> None:
    """One process is enough: the weight is a DTensor outside the head's own call, a tensor inside it."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    start = build("llama").train()
    batch = inputs("llama", start)
    theirs = step(copy.deepcopy(start), batch)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = copy.deepcopy(start)
        if order == "patch first":
            cce_patch(model)
        for module in (model.lm_head, *model.model.layers, model):
            fully_shard(module, mesh=mesh)
        if order == "shard first":
            cce_patch(model)
        ours = step(model, batch)
        counts = copy.copy(cce_counts(model))
        gradients = {name: x.full_tensor() for name, x in ours.gradients.items()}  # type: ignore[attr-defined]
        logits = model(**batch).logits
        assert logits[:, -1].isfinite().all()
    finally:
        distributed.destroy_process_group()
    assert (counts.fused, counts.materialised) == (1, 0)
    assert abs(ours.loss - theirs.loss) <= GRADIENT_ALLOWED * theirs.loss
    assert difference(gradients, theirs.gradients) <= GRADIENT_ALLOWED


def test_what_zero_3_does_to_a_process(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without DeepSpeed: an F.linear in Python that knows tensors alone, and a head's weight marked as its shard.
    tests/test_parallel.py has DeepSpeed itself."""
    batch = inputs("llama", llama)
    theirs = step(copy.deepcopy(llama), batch)
    evaluated = copy.deepcopy(llama).eval()(**batch)

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.addmm(bias, input, weight.t()) if input.dim() == 2 and bias is not None else input @ weight.t()

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    ours = step(cce_patch(llama), batch)
    assert (cce_counts(llama).fused, cce_counts(llama).materialised) == (1, 0)
    assert abs(ours.loss - theirs.loss) <= GRADIENT_ALLOWED * theirs.loss
    assert difference(ours.gradients, theirs.gradients) <= GRADIENT_ALLOWED
    llama.lm_head.weight.ds_id = 7
    output = llama.eval()(**batch)
    assert type(output.logits) is Tensor and near(output.logits, evaluated.logits, evaluated.logits)
    assert cce_counts(llama).fused == 2


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}], ids=str)
def test_distributed_data_parallel(options: dict[str, bool], tmp_path: Path) -> None:
    """The model goes before its process group does: the last owner of a group waits for the group's threads, and those
    for Python's lock, which the model's end holds.
    """
    from torch import distributed

    start = build("llama").train()
    batch = inputs("llama", start)
    theirs = step(copy.deepcopy(start), batch)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(start), **options)
        assert cce_patch(model) is model
        ours = step(model, batch)
        counts = copy.copy(cce_counts(model))
        uncce_patch(model)
        del model
        gc.collect()
    finally:
        distributed.destroy_process_group()
    assert (counts.fused, counts.materialised) == (1, 0)
    gradients = {name.removeprefix("module."): x for name, x in ours.gradients.items()}
    assert difference(gradients, theirs.gradients) <= GRADIENT_ALLOWED


def test_the_benchmark_of_whole_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from cce_precision.analysis import step_bench

    sizes = ["--vocabulary", "512", "--hidden", "32", "--layers", "1", "--batch", "2", "--length", "16"]
    methods = ["--methods", "unpatched,cce_exact,liger-loss", "--device", "cpu"]
    step_bench.main([*sizes, *methods, "--steps", "3", "--out", str(tmp_path)])
    head, plain, patched = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert list(head["refused"]) == ["liger-loss"] and "liger-loss" in (tmp_path / "README.md").read_text()
    assert patched["fused"] == 4, "three steps and the trial"
    assert len(plain["losses"]) == 3 and plain["losses"][2] < plain["losses"][0]
    assert abs(patched["losses"][0] - plain["losses"][0]) <= GRADIENT_ALLOWED * plain["losses"][0]
    written = (tmp_path / "README.md").read_text()
    step_bench.main(["--page-only", "--out", str(tmp_path)])
    assert (tmp_path / "README.md").read_text() == written
    with pytest.raises(SystemExit):
        step_bench.main(["--methods", "tiger"])
    assert "'tiger' is no method" in capsys.readouterr().err


FOLDERS = [Path(name) for name in os.environ.get("CCE_TRANSFORMERS_FOLDERS", "").split(os.pathsep) if name]
SOME = "llama,gpt2,gemma2,cohere,granite,phi,bert,xlm,prophetnet,mixtral,bart,mamba,opt,qwen3,falcon_h1"


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS or [None], ids=str)
def test_another_release_of_transformers(folder: Path | None, tmp_path: Path) -> None:
    """CCE_TRANSFORMERS_FOLDERS names folders with one each: pip install --no-deps --target FOLDER transformers==...
    (with tokenizers<=0.23.0; 4.57 needs huggingface-hub<1.0 too, 5.0 huggingface-hub<2 and its httpx)."""
    if folder is None or not folder.exists():
        pytest.skip("CCE_TRANSFORMERS_FOLDERS names no folder with another transformers")
    command = [sys.executable, "-W", "ignore", "-m", "cce_precision.analysis.census", "--out", tmp_path, "--only", SOME]
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = read(tmp_path / "models.csv")
    assert len(rows) == len(SOME.split(",")) and {row.transformers for row in rows} != {transformers.__version__}
    assert [row for row in rows if row.result != "passed"] == []


def test_the_committed_census() -> None:
    """Three releases, at least 98 % of what can be built in each, and the page is that of the rows."""
    folder = ROOT / "reports" / "transformers"
    rows = read(folder / "models.csv")
    assert (folder / "README.md").read_text() == page(rows)
    releases = {row.transformers for row in rows}
    assert len(releases) >= 3 and transformers.__version__ in releases
    for release in releases:
        built = [row for row in rows if row.transformers == release and row.built]
        assert sum(row.result == "passed" for row in built) >= 0.98 * len(built) >= 98
        assert {row.result for row in built} <= {"passed", "refused", "unfused"} and all(
            row.why for row in built if row.result != "passed"
        )


@pytest.mark.slow
def test_the_census(tmp_path: Path) -> None:
    """At least 98 % of the classes that can be built, no wrong loss among the rest, and the page says which."""
    from cce_precision.analysis.census import run

    rows = run(tmp_path)
    built = [row for row in rows if row.built]
    passed = [row for row in built if row.result == "passed"]
    assert len(built) >= 100 and len(passed) >= 0.98 * len(built)
    assert {row.result for row in built} <= {"passed", "refused", "unfused"}
    text = (tmp_path / "README.md").read_text()
    assert all(row.model in text for row in built)
    before = (tmp_path / "models.csv").read_text()
    assert str(run(tmp_path)) == str(read(tmp_path / "models.csv"))  # a NaN is not equal to another
    assert (tmp_path / "models.csv").read_text() == before
