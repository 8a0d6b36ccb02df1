"""Patched models on a GPU: the Triton kernels inside a model's own forward, beside the unpatched model in fp32 and
bf16."""

from __future__ import annotations

import copy

import pytest
import torch

from cce_precision.huggingface import cce_counts, cce_patch, uncce_patch

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.gpu

VOCABULARY, HIDDEN = 4099, 128


def model(family: str, dtype: torch.dtype) -> torch.nn.Module:
    config_class = getattr(transformers, f"{family}Config")
    config = config_class(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        attention_dropout=0.0,
    )  # fmt: skip
    made = getattr(transformers, f"{family}ForCausalLM")(config)
    for parameter in made.parameters():  # logits that differ
        torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.02)
    return made.to("cuda", dtype).train()


def step(made: torch.nn.Module, tokens: torch.Tensor, labels: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    made.zero_grad()
    loss = made(input_ids=tokens, labels=labels).loss
    loss.backward()
    return loss.item(), {name: p.grad.double() for name, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_patched_model_is_at_least_as_exact_as_the_unpatched_one(family: str, dtype: torch.dtype) -> None:
    """Both beside the same weights in fp64: the error of the patched model's loss and gradients is no larger than twice
    the unpatched one's, plus what one more rounding of each gradient could cost."""
    plain = model(family, dtype)
    tokens = torch.randint(3, VOCABULARY, (4, 64), device="cuda")
    labels = tokens.clone()
    labels[0, :20] = -100
    truth_loss, truth = step(copy.deepcopy(plain).double(), tokens, labels)
    loss, gradients = step(plain, tokens, labels)
    patched = cce_patch(copy.deepcopy(plain), backend="triton")
    fused_loss, fused = step(patched, tokens, labels)
    counts = cce_counts(patched)
    assert (counts.fused, counts.materialised) == (1, 0)
    roundoff = torch.finfo(dtype).eps / 2
    assert abs(fused_loss - truth_loss) <= 2 * abs(loss - truth_loss) + 4 * torch.finfo(torch.float32).eps * truth_loss
    for name, exact in truth.items():
        scale = exact.norm()
        allowed = 2 * (gradients[name] - exact).norm() + 8 * roundoff * scale
        assert (fused[name] - exact).norm() <= allowed, name
        assert scale > allowed, f"{name}: the allowance would pass a zero gradient"


def test_a_step_needs_no_memory_for_logits() -> None:
    tokens = torch.randint(3, VOCABULARY, (64, 128), device="cuda")
    patched = cce_patch(model("Llama", torch.bfloat16), backend="triton")
    step(patched, tokens, tokens)  # compiled by now
    fused = peak(patched, tokens)
    assert fused + tokens.numel() * VOCABULARY * 2 <= peak(uncce_patch(patched), tokens)


def peak(made: torch.nn.Module, tokens: torch.Tensor) -> int:
    """Bytes that a step takes beyond what is there before it."""
    made.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    made(input_ids=tokens, labels=tokens).loss.backward()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
