"""Real text from Debian packages, and the byte-level tokenizer that is trained on it.

Any Debian or Ubuntu machine can rebuild the text: packages are fetched by name with `apt-get download`, unpacked with
`dpkg -x` (nothing is installed, no root needed) and read in a fixed order; HTML is stripped with the standard library's
parser and a line seen before is dropped. Two tiers of licences: `public-domain`, the only text from which captured
heads are shipped (targets and tokenizer let a reader recover it), and `permissive`, which is trained on but never
shipped. Copyleft text is left out.

    python3 -m cce_precision.analysis.corpus FOLDER

writes public-domain.txt.xz, permissive.txt.xz, heldout.txt.xz (public domain, never trained on) and sources.json.

This file imports nothing of the library, and `tokenizers` only where it is used.
"""

from __future__ import annotations

import contextlib
import fnmatch
import gzip
import hashlib
import html.parser
import json
import lzma
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    import numpy as np

TIERS = ("public-domain", "permissive")
HELDOUT_CHARS = 65_536  # the last characters of every public-domain source, never trained on
SHORT_LINE = 24  # shorter lines (closing braces, table cells) may repeat


@dataclass(frozen=True)
class Source:
    """Text of a few Debian packages under one licence.

    `packages` are names or patterns (the newest match counts), `files` are patterns of paths inside them, and `read`,
    where given, takes the unpacked folder and yields documents instead of the default reader.
    """

    name: str
    tier: str  # one of TIERS
    licence: str
    packages: tuple[str, ...]
    files: tuple[str, ...] = ("*.html",)
    read: Callable[[Path], Iterator[str]] | None = None


def _king_james(root: Path) -> Iterator[str]:
    """The King James Bible, printed by the package's own binary (the text is compressed in a format of its own)."""
    command = [str(root / "usr/bin/bible"), "-p", str(root / "usr/lib"), "-f", "gen1:1-rev99:99"]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=True
    )
    yield done.stdout


SOURCES = (
    Source("sqlite", "public-domain", "public domain", ("sqlite3-doc",)),
    Source("king-james-bible", "public-domain", "public domain", ("bible-kjv", "bible-kjv-text"), read=_king_james),
    Source("jargon-file", "public-domain", "public domain", ("dict-jargon",), ("*.dict.dz",)),
    Source("devils-dictionary", "public-domain", "public domain", ("dict-devil",), ("*.dict.dz",)),
    Source("wordnet", "permissive", "WordNet licence", ("dict-wn",), ("*.dict.dz",)),
    Source("python-doc", "permissive", "PSF-2.0", ("python3.*-doc",), ("*/html/*.html",)),
    Source("python-stdlib", "permissive", "PSF-2.0", ("libpython3.*-stdlib",), ("*.py",)),
    Source("postgresql", "permissive", "PostgreSQL licence", ("postgresql-doc-[0-9]*",)),
    Source("apache-httpd", "permissive", "Apache-2.0", ("apache2-doc",), ("*/manual/*.html",)),
    Source("erlang", "permissive", "Apache-2.0", ("erlang-doc",)),
    Source("openssl", "permissive", "Apache-2.0", ("libssl-doc",), ("*/man/*.gz",)),
    Source("django", "permissive", "BSD-3-Clause", ("python-django-doc",)),
    Source("pandas", "permissive", "BSD-3-Clause", ("python-pandas-doc",)),
    Source("scipy", "permissive", "BSD-3-Clause", ("python-scipy-doc",)),
    Source("rust", "permissive", "MIT or Apache-2.0", ("rust-doc",)),
    Source("go", "permissive", "BSD-3-Clause", ("golang-1.[0-9]*-src",), ("*.go",)),
)


# -- text out of files -------------------------------------------------------------------------------------------------


class _Stripper(html.parser.HTMLParser):
    """Collects the visible text of a page: blocks on lines of their own, white space kept inside <pre> only."""

    SKIP = frozenset({"script", "style", "head", "nav", "footer", "svg", "button", "form"})
    INLINE = frozenset(
        {
            "a",
            "b",
            "i",
            "u",
            "em",
            "strong",
            "code",
            "span",
            "tt",
            "sub",
            "sup",
            "var",
            "kbd",
            "small",
            "font",
            "cite",
            "wbr",
            "q",
            "img",
        }
    )

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.skipping = self.pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.SKIP:
            self.skipping += 1
        elif tag == "pre":
            self.pre += 1
        if tag not in self.INLINE:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.SKIP:
            self.skipping = max(0, self.skipping - 1)
        elif tag == "pre":
            self.pre = max(0, self.pre - 1)
        if tag not in self.INLINE:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            self.parts.append(data if self.pre else re.sub(r"\s+", " ", data))


def strip_html(page: str) -> str:
    """The visible text of an HTML page, at most one empty line in a row."""
    stripper = _Stripper()
    stripper.feed(page)
    stripper.close()
    lines = "".join(stripper.parts).replace("\u00b6", "").split("\n")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in lines)).strip()


def _strip_troff(page: str) -> str:
    """The running text of a manual page: requests dropped, the commonest escapes resolved."""
    lines = (re.sub(r"^\.(?:SH|SS|IP|TP|B|I|BR|IX)\s*", "", line) for line in page.split("\n"))
    text = "\n".join(line for line in lines if not line.startswith((".", "'")))
    return re.sub(r"\\f.|\\&|\\s[-+]?\d", "", text).replace("\\-", "-").replace("\\e", "\\")


def _read_document(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix in (".gz", ".dz"):
        data = gzip.decompress(data)
    text = data.decode("utf-8", errors="replace")
    if ".html" in path.name:
        return strip_html(text)
    return _strip_troff(text) if "/man/" in path.as_posix() else text


def _read_files(root: Path, patterns: Sequence[str]) -> Iterator[str]:
    for path in sorted(p for p in root.rglob("*") if p.is_file() and not p.is_symlink()):
        inside = "/" + path.relative_to(root).as_posix()
        if "/testdata/" not in inside and any(fnmatch.fnmatch(inside, pattern) for pattern in patterns):
            yield _read_document(path)


def _drop_repeats(text: str, seen: set[bytes]) -> str:
    kept = []
    for line in text.split("\n"):
        words = line.strip()
        if len(words) >= SHORT_LINE:
            key = hashlib.blake2b(words.encode(), digest_size=8).digest()
            if key in seen:
                continue
            seen.add(key)
        kept.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()


# -- packages ----------------------------------------------------------------------------------------------------------


def _newest(pattern: str) -> str:
    """The package that a pattern means here; where several match, the one with the highest version in its name."""
    if not any(char in pattern for char in "*[?"):
        return pattern
    prefix = re.split(r"[*?\[]", pattern)[0]
    known = subprocess.run(["apt-cache", "pkgnames", prefix], capture_output=True, text=True, check=True).stdout.split()
    matches = [name for name in known if fnmatch.fnmatchcase(name, pattern)]
    if not matches:
        raise LookupError(f"no package matches {pattern!r}; is `apt-get update` due?")
    return max(matches, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])


def _unpack(source: Source, cache: Path, root: Path) -> list[str]:
    """Downloads (unless cached) and unpacks the packages of a source into root; returns them as name_version."""
    found = []
    for pattern in source.packages:
        name = _newest(pattern)
        if not (archives := sorted(cache.glob(f"{name}_*.deb"))):
            done = subprocess.run(["apt-get", "download", "-qq", name], cwd=cache, capture_output=True, text=True)
            if done.returncode != 0:
                raise LookupError(f"apt-get download {name} failed: {done.stderr.strip()}")
            archives = sorted(cache.glob(f"{name}_*.deb"))
        subprocess.run(["dpkg", "-x", archives[-1], root], check=True)
        found.append("_".join(archives[-1].name.split("_")[:2]).replace("%3a", ":"))
    return found


def gather(folder: Path, tiers: Sequence[str] = TIERS, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Writes TIER.txt.xz, heldout.txt.xz and sources.json into the folder; returns what the last one holds.

    The held-out text is the last 65,536 characters of every public-domain source and of nothing else. A source that
    this machine's archive does not carry is left out and named. Packages are kept in FOLDER/packages, so a second run
    needs no network.

    Raises ValueError for an unknown tier, RuntimeError when apt or dpkg is missing, LookupError when nothing could be
    read. About ten minutes of one core.
    """
    if unknown := set(tiers) - set(TIERS):
        raise ValueError(f"tier {unknown.pop()!r} is not known; allowed are {', '.join(TIERS)}")
    for tool in ("apt-get", "apt-cache", "dpkg"):
        if shutil.which(tool) is None:
            raise RuntimeError(
                f"{tool} was not found: text is gathered from Debian packages. "
                "Elsewhere, give files of your own: cce-precision capture --train --text FILE..."
            )
    cache = folder / "packages"
    cache.mkdir(parents=True, exist_ok=True)
    seen, records = set[bytes](), []
    with contextlib.ExitStack() as stack:

        def writer(name: str) -> TextIO:
            return stack.enter_context(lzma.open(folder / f"{name}.txt.xz", "wt", encoding="utf-8"))

        files = {name: writer(name) for name in (*tiers, "heldout")}
        for source in (s for s in SOURCES if s.tier in files):
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                try:
                    packages = _unpack(source, cache, Path(scratch))
                except LookupError as error:
                    say(f"{source.name}: left out, {error}")
                    continue
                documents = source.read(Path(scratch)) if source.read else _read_files(Path(scratch), source.files)
                text = "\n\n".join(filter(None, (_drop_repeats(document, seen) for document in documents)))
            if source.tier == "public-domain":
                files["heldout"].write(text[-HELDOUT_CHARS:].strip() + "\n\n")
                text = text[:-HELDOUT_CHARS]
            files[source.tier].write(text + "\n\n")
            record = {"name": source.name, "tier": source.tier, "licence": source.licence}
            records.append({**record, "packages": packages, "characters": len(text)})
            say(f"{source.name}: {len(text) / 1e6:.1f} M characters from {', '.join(packages)}")
    if not records:
        raise LookupError(
            "no source could be read; run `apt-get update`, or give files of your own: "
            "cce-precision capture --train --text FILE..."
        )
    manifest = {"heldout_characters_per_public_domain_source": HELDOUT_CHARS, "sources": records}
    (folder / "sources.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


# -- text to tokens ----------------------------------------------------------------------------------------------------


def read_text(paths: Iterable[Path]) -> str:
    """The text of the given files (plain, .xz or .gz) one after the other."""
    opened: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}
    texts = []
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist; `python3 -m cce_precision.analysis.corpus FOLDER` gathers text"
            )
        with opened.get(path.suffix, open)(path, "rb") as file:
            texts.append(file.read().decode("utf-8", errors="replace"))
    return "\n\n".join(texts)


def _pieces(text: str, size: int = 1 << 16) -> Iterator[str]:
    """The text cut after line ends into pieces of about `size` characters."""
    start = 0
    while start < len(text):
        stop = text.find("\n", start + size) + 1 or len(text)
        yield text[start:stop]
        start = stop


def train_tokenizer(text: str, vocabulary: int) -> Any:
    """A byte-level BPE `tokenizers.Tokenizer` with exactly `vocabulary` entries; ValueError when the text is too short
    for it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator(_pieces(text), trainer)
    if tokenizer.get_vocab_size() != vocabulary:
        raise ValueError(
            f"the text gives a vocabulary of {tokenizer.get_vocab_size()}, asked for {vocabulary}: give more text"
        )
    return tokenizer


def encode(tokenizer: Any, text: str) -> np.ndarray:
    """Token ids of the text, int32 (tokens,), encoded in parallel on all cores."""
    import numpy as np

    pieces, ids = list(_pieces(text)), []
    for first in range(0, len(pieces), 256):
        ids += [
            np.asarray(piece.ids, dtype=np.int32) for piece in tokenizer.encode_batch_fast(pieces[first : first + 256])
        ]
    return np.concatenate(ids) if ids else np.zeros(0, dtype=np.int32)


if __name__ == "__main__":
    import typer

    def main(folder: Path, tier: list[str] = typer.Option(list(TIERS), help="licences to gather")) -> None:
        """Gathers text from Debian packages into FOLDER."""
        gather(folder, tier)

    typer.run(main)
