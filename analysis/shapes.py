"""The heads of known language models, as data: shapes for the benchmark, dimensions for the memory table."""

from __future__ import annotations

import dataclasses
import difflib
import re
from dataclasses import dataclass

__all__ = ["MODELS", "SHAPES", "Model", "Shape", "shape"]


@dataclass(frozen=True)
class Model:
    """A published model. Parameters count every weight once (tied embeddings once)."""

    name: str
    vocabulary: int
    width: int
    layers: int
    parameters: int
    softcap: float | None = None


MODELS = {
    model.name: model
    for model in (
        Model("gpt2", 50257, 768, 12, 124_439_808),
        Model("llama3.2-1b", 128256, 2048, 16, 1_235_814_400),
        Model("gemma2-2b", 256000, 2304, 26, 2_614_341_888, softcap=30.0),
        Model("phi3.5-mini", 32064, 3072, 32, 3_821_079_552),
        Model("llama3-8b", 128256, 4096, 32, 8_030_261_248),
        Model("qwen3-8b", 151936, 4096, 36, 8_190_735_360),
        Model("gemma2-9b", 256000, 3584, 42, 9_241_705_984, softcap=30.0),
        Model("mistral-nemo", 131072, 5120, 40, 12_247_782_400),
        Model("llama2-13b", 32000, 5120, 40, 13_015_864_320),
    )
}


@dataclass(frozen=True)
class Shape:
    """One problem size: n tokens against a head of v rows and d columns."""

    name: str
    n: int
    v: int
    d: int
    softcap: float | None = None

    def __str__(self) -> str:
        cap = "" if self.softcap is None else f", softcap {self.softcap:g}"
        return f"{self.name} (N={self.n}, V={self.v}, D={self.d}{cap})"


TOKENS = 8192
SHAPES = {
    **{m.name: Shape(m.name, TOKENS, m.vocabulary, m.width, m.softcap) for m in MODELS.values()},
    "real": Shape("real", TOKENS, 131072, 1024),  # the size of a head trained on real text by hand
    "cpu": Shape("cpu", 1024, 32768, 256),
}


def shape(text: str, softcap: bool = True) -> Shape:
    """The shape called `text`: a name, a name with other tokens (gemma2-2b@4096), or NxVxD (1024x32768x256).

    `softcap=False` leaves the model's softcap out. Raises ValueError for an unknown name, listing the known ones.
    """
    if match := re.fullmatch(r"(\d+)x(\d+)x(\d+)", text):
        n, v, d = map(int, match.groups())
        if 0 in (n, v, d):
            raise ValueError(f"a shape is NxVxD with three positive numbers, got {text!r}")
        return Shape(text, n, v, d)
    name, _, tokens = text.partition("@")
    if name not in SHAPES or (tokens and not (tokens.isdigit() and int(tokens))):
        near = difflib.get_close_matches(name, SHAPES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near and near[0] != name else ""
        raise ValueError(f"{text!r} is no known shape; known: {', '.join(SHAPES)}, NAME@TOKENS and NxVxD{hint}")
    known = SHAPES[name]
    if tokens:
        known = dataclasses.replace(known, n=int(tokens))
    return known if softcap else dataclasses.replace(known, softcap=None)
