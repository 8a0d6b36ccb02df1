"""Text for training: files to tokens, tokens to windows, windows to the batch of a step.

The batch of step s is a function of (tokens, seed, s) alone: every variant, every resumed run and every number of
processes sees the same windows in the same order. An epoch is a random permutation of all windows.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cce_precision.analysis.capture import DATA
from cce_precision.analysis.corpus import read_text, train_tokenizer

__all__ = ["SHIPPED", "Order", "Tokens", "documents", "load_tokenizer", "tokenise"]

SHIPPED = DATA / "pentateuch.txt.xz"  # 0.86 MB of public-domain text
CHUNK = 8  # windows that are held out together
HELDOUT_SHARE = 20  # one of so many chunks is held out
PIECES = 256  # that a share of a long text is taken in
PIECE = 1 << 16  # characters that are encoded at a time
OPENERS = {".xz": lzma.open, ".gz": gzip.open}


@dataclass(frozen=True)
class Tokens:
    """Token ids to train on and to hold out, int32 (count,), and what they are ids of."""

    training: np.ndarray
    heldout: np.ndarray
    vocabulary: int
    tokenizer: str  # JSON of the tokenizer

    @property
    def digest(self) -> str:
        """A hash of all of it: runs are comparable, and resume, where it is the same."""
        sha = hashlib.sha256(self.tokenizer.encode())
        for ids in (self.training, self.heldout):
            sha.update(ids.tobytes())
        return sha.hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Writes the ids and the tokenizer to one .npz file."""
        np.savez(path, training=self.training, heldout=self.heldout, meta=np.array([self.tokenizer]), v=self.vocabulary)

    @staticmethod
    def load(path: Path) -> Tokens:
        """What `save` wrote."""
        with np.load(path) as file:
            return Tokens(file["training"], file["heldout"], int(file["v"]), str(file["meta"][0]))


def documents(path: Path, field: str = "text") -> Iterator[str]:
    """The documents of a file: one a line of a JSON-lines file (.jsonl, .jsonl.xz, .jsonl.gz), else the whole file.

    Raises FileNotFoundError, and ValueError naming file and line where a line has no text in `field`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    if ".jsonl" not in path.suffixes[-2:]:
        yield read_text([path])
        return
    with OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as lines:  # type: ignore[operator]
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[field]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: no JSON object with the field {field!r} ({error})") from None
            if not isinstance(text, str):
                raise ValueError(f"{path}, line {number}: {field!r} is no text but {type(text).__name__}")
            yield text


def share(text: str, characters: int) -> str:
    """About so many characters of a text, in pieces spread evenly over it and cut after line ends."""
    if characters >= len(text):
        return text
    taken = []
    for i in range(PIECES):
        start = text.find("\n", i * len(text) // PIECES) + 1
        taken.append(text[start : text.find("\n", start + characters // PIECES) + 1])
    return "".join(taken)


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        stop = text.find("\n", start + PIECE) + 1 or len(text)
        yield text[start:stop]
        start = stop


def _encode(tokenizer: Any, texts: Sequence[str], separator: int | None) -> np.ndarray:
    """Ids of the documents one after the other, int32 (tokens,), each followed by `separator` where there is one."""
    pieces: list[tuple[str, bool]] = []  # and whether a document ends with it
    for text in texts:
        pieces += [(piece, False) for piece in _pieces(text)]
        pieces[-1:] = [(piece, separator is not None) for piece, _ in pieces[-1:]]
    ids: list[np.ndarray] = []
    for first in range(0, len(pieces), 256):
        group = pieces[first : first + 256]
        encoded = tokenizer.encode_batch_fast([piece for piece, _ in group], add_special_tokens=False)
        for (_, last), one in zip(group, encoded):
            ids.append(np.asarray([*one.ids, separator] if last else one.ids, dtype=np.int32))
    return np.concatenate(ids) if ids else np.zeros(0, dtype=np.int32)


def load_tokenizer(path: Path) -> Any:
    """The `tokenizers.Tokenizer` of a file (JSON, also .xz or .gz of one) or of a folder that holds tokenizer.json.

    Raises FileNotFoundError where there is none.
    """
    from tokenizers import Tokenizer

    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; give a tokenizer's JSON file with --tokenizer")
    return Tokenizer.from_str(read_text([file]))


def tokenise(
    text: Sequence[Path],
    heldout: Path | None,
    *,
    context: int,
    vocabulary: int,
    tokenizer: Path | None = None,
    separator: int | None = None,
    field: str = "text",
    megabytes: float | None = None,
) -> Tokens:
    """Reads and tokenises files; without `tokenizer` a byte-level BPE of `vocabulary` entries is trained on the text.

    `megabytes`: only so many million characters, in pieces spread over the text. `separator`: a token id after each
    document; None: a blank line. Without `heldout`, one of 20 runs of 8 windows is held out.
    Raises FileNotFoundError or ValueError for files and for texts that are too short.
    """
    texts = [document for path in text for document in documents(path, field)]
    if megabytes is not None:
        total = sum(map(len, texts))
        texts = [share(one, round(megabytes * 1e6 * len(one) / total)) for one in texts]
    if separator is None:
        texts = ["\n\n".join(texts)]
    bpe = load_tokenizer(tokenizer) if tokenizer else train_tokenizer("\n\n".join(texts), vocabulary)
    ids = _encode(bpe, texts, separator)
    if heldout is not None:
        training, held = ids, _encode(bpe, list(documents(heldout, field)), separator)
    else:
        chunk = context * CHUNK
        out = np.arange(len(ids)) // chunk % HELDOUT_SHARE == HELDOUT_SHARE - 1
        training, held = ids[~out], ids[out]
    for name, some in (("training", training), ("held-out", held)):
        if len(some) < context:
            raise ValueError(f"the {name} text has {len(some)} tokens, fewer than one window of {context}; give more")
    return Tokens(training, held, bpe.get_vocab_size(), bpe.to_str())


@dataclass(frozen=True)
class Order:
    """Which windows of `context` tokens each step trains on."""

    ids: np.ndarray  # int32 (tokens,)
    context: int
    batch: int  # windows a step, over all processes
    seed: int

    @property
    def windows(self) -> int:
        return len(self.ids) // self.context

    def indices(self, step: int) -> list[int]:
        """The windows of a step, in order; an epoch's permutation follows the other."""
        found: list[int] = []
        position = step * self.batch
        while len(found) < self.batch:
            epoch, offset = divmod(position + len(found), self.windows)
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(self.windows, generator=generator)
            found += order[offset : offset + self.batch - len(found)].tolist()
        return found

    def take(self, indices: Sequence[int]) -> Tensor:
        """Token ids (len(indices), context), int64, of these windows."""
        rows = [self.ids[i * self.context : (i + 1) * self.context] for i in indices]
        return torch.from_numpy(np.stack(rows).astype(np.int64))
