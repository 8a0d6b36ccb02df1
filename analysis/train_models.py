"""Models for training, and what their loss is: `Method` names it, `prepare` puts it into a model.

cce_exact  cce@2^-10  cce_subsampled@2^-12/16   a variant, its threshold, and one of how many columns and tokens
unpatched                                       the model as transformers has it
fp32                                            the same with the head's product and its loss in fp32
fp32-perturbed                                  fp32 from weights one rounding away: how far apart equals drift
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cce_precision.analysis.configured import configured
from cce_precision.numerics import Variant

__all__ = ["SIZES", "Method", "build", "prepare"]

REFERENCES = ("unpatched", "fp32", "fp32-perturbed")
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2},
    "small": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4},
    "medium": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8},
    "large": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
}


@dataclass(frozen=True)
class Method:
    """How the loss is computed: a variant, or one of `REFERENCES`."""

    name: str
    variant: Variant | None  # None: PyTorch's own loss on logits in memory

    @staticmethod
    def parse(text: str) -> Method:
        """The method of a name as the module's head lists them. Raises ValueError saying what is allowed."""
        if text in REFERENCES:
            return Method(text, None)
        try:
            return Method(text, configured(text))
        except ValueError as error:
            raise ValueError(f"{error}; beside variants: {', '.join(REFERENCES)}") from None

    @property
    def fp32(self) -> bool:
        """Whether the head's product is in fp32 whatever the precision of the run."""
        return self.name.startswith("fp32")


def build(model: str | None, config: str, size: str, vocabulary: int, context: int, dtype: torch.dtype) -> nn.Module:
    """A causal language model: pretrained from a folder, or of a config with weights drawn from PyTorch's generator.

    `config` is a family of transformers (llama, qwen3, gemma2, gpt2, ...), which `size` and `vocabulary` complete, or
    a config.json, taken as it is but for the vocabulary. Raises ValueError naming what is allowed.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    if model is not None:
        if not Path(model).is_dir():
            raise ValueError(f"model is {model!r}, it must be the folder of a pretrained model")
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, local_files_only=True)
        if loaded.get_output_embeddings().weight.shape[0] < vocabulary:
            raise ValueError(f"{model} has fewer rows in its head than the tokenizer has entries, {vocabulary}")
        return loaded
    special: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if config.endswith(".json"):
        if not Path(config).is_file():
            raise ValueError(f"config is {config!r}, but there is no such file")
        settings = AutoConfig.from_pretrained(config, vocab_size=vocabulary, **special)
    else:
        if size not in SIZES:
            raise ValueError(f"size is {size!r}, allowed are {', '.join(SIZES)}")
        shape = SIZES[size] | {"num_key_value_heads": SIZES[size]["num_attention_heads"]}
        shape |= {"vocab_size": vocabulary, "max_position_embeddings": context}
        try:
            settings = AutoConfig.for_model(config, **shape, **special, tie_word_embeddings=True)
        except ValueError:
            raise ValueError(
                f"config is {config!r}, it must be a family that transformers knows, such as llama, qwen3 or gemma2, "
                "or a file config.json"
            ) from None
    return AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa", dtype=dtype)


def prepare(model: nn.Module, method: Method) -> None:
    """Gives the model its loss, in place."""
    if method.variant is not None:
        from cce_precision.huggingface import cce_patch

        cce_patch(model, impl=method.variant)
        return
    if method.name == "fp32-perturbed":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.nextafter(parameter, torch.full_like(parameter, torch.inf)))
    if method.fp32:
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        head.forward = types.MethodType(_in_fp32, head)


def _in_fp32(head: nn.Linear, e: Tensor) -> Tensor:
    """The head's logits (..., V) in fp32, under autocast too."""
    bias = None if head.bias is None else head.bias.float()
    with torch.autocast(e.device.type, enabled=False):
        return F.linear(e.float(), head.weight.float(), bias)
