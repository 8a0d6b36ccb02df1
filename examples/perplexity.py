"""Perplexity of a transformers model on a text, token by token, without logits.

    python examples/perplexity.py --model FOLDER --text FILE     # any causal language model and any text
    python examples/perplexity.py                                # a small one with random weights, a shipped text

`cce_patch(model, reduction="none")` makes the model return each token's loss; the sum over windows that overlap counts
every token once, each with at least `context - stride` tokens before it.
"""

import argparse
import lzma
import math
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

from cce_precision import cce_patch
from cce_precision.analysis.train_text import SHIPPED

IGNORED = -100


@torch.no_grad()
def perplexity(model: PreTrainedModel, ids: Tensor, context: int, stride: int) -> float:
    """exp of the mean loss of ids (T,) after the first, in windows of `context` tokens that advance by `stride`."""
    cce_patch(model, reduction="none")
    model.eval()
    total, counted = 0.0, 1  # the first token has nothing that predicts it
    for start in range(0, len(ids), stride):
        window = ids[start : start + context]
        labels = window.clone()
        labels[: counted - start] = IGNORED  # what an earlier window has counted
        total += model(input_ids=window[None], labels=labels[None]).loss.double().sum().item()
        counted = start + len(window)
        if counted == len(ids):
            break
    return math.exp(total / (len(ids) - 1))


def main(arguments: list[str] | None = None) -> float:
    """Prints and returns the perplexity."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, help="folder of a model with its tokenizer")
    parser.add_argument("--text", type=Path, default=SHIPPED, help="a text file, or an .xz of one")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--stride", type=int, default=64)
    parser.add_argument("--characters", type=int, default=4000, help="so many of the text; 0: all")
    given = parser.parse_args(arguments)
    with (lzma.open if given.text.suffix == ".xz" else open)(given.text, "rt") as file:
        text = file.read(given.characters or -1)
    if given.model:
        model = AutoModelForCausalLM.from_pretrained(given.model)
        ids = AutoTokenizer.from_pretrained(given.model)(text, return_tensors="pt").input_ids[0]
    else:
        torch.manual_seed(0)
        shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
        settings = LlamaConfig(vocab_size=256, bos_token_id=None, eos_token_id=None, **shape)
        model = AutoModelForCausalLM.from_config(settings)
        ids = torch.tensor(list(text.encode()))  # bytes
    found = perplexity(model, ids, given.context, given.stride)
    print(f"perplexity {found:.4g} over {len(ids) - 1:,} tokens")
    return found


if __name__ == "__main__":
    main()
