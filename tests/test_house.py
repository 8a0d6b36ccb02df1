"""The house: import arrows, packaging, documentation. Everything here runs in fresh processes or reads source files."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import cce_precision
from cce_precision.cli import app, main

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "cce_precision"
PARTS = {
    "cce_precision": PACKAGE,
    "cce_precision.variants": ROOT / "variants",
    "cce_precision.analysis": ROOT / "analysis",
}

# Higher numbers import lower ones (AGENTS.md). eager and kernels share a rank: neither knows the other.
RANKS = {
    "numerics": 0,
    "problem": 1,
    "promise": 1.5,
    "variants": 1,
    "eager": 2,
    "kernels": 2,
    "autograd": 3,
    "validation": 3,
    "migration": 3,
    "choosing": 3.5,
    "parallel": 3.5,
    "dtensor": 3.7,
    "interface": 4,
    "": 5,  # the package itself: public names only
    "huggingface": 6,
    "transformers": 7,  # its other name
    "analysis": 7,
    "cli": 8,
    "__main__": 9,
}
# What a training run must not pay for, or may not have.
HEAVY = {
    "flint", "hypothesis", "liger_kernel", "matplotlib", "mpmath", "pandas", "plotly", "pyarrow", "quack", "ray",
    "rich", "safetensors", "tokenizers", "transformers", "triton", "typer",
}  # fmt: skip
COMMAND = re.compile(r"(?:cce-precision|python3? -m cce_precision) +([a-z][a-z-]*)")


def fresh(code: str, path: Path = ROOT, **environment: str) -> str:
    """The output of `code` in a new interpreter that finds the package in `path`."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(path), **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=os.sep)
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules_after(code: str) -> set[str]:
    """The modules that `code` brings beyond those of torch alone."""
    count = (
        "import sys, json, torch; before = set(sys.modules); {}; print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    return set(json.loads(fresh(count.format(code))))


def roots(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


# -- arrows ------------------------------------------------------------------------------------------------------------


def sources() -> Iterator[tuple[str, Path]]:
    """(module name below the package, file) of every source file; "" is the package itself."""
    for path in sorted(PACKAGE.glob("*.py")):
        yield path.stem if path.stem != "__init__" else "", path
    for folder in sorted(p for p in PACKAGE.iterdir() if p.is_dir() and (p / "__init__.py").exists()):
        for path in sorted(folder.rglob("*.py")):
            yield (
                ".".join((folder.name, *path.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__"),
                path,
            )


def imports(name: str, path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import in a file, also those inside functions."""
    package = f"cce_precision.{name}".rstrip(".").split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            # `from package import name` may name a module of the package
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def part(module: str) -> str | None:
    """The part of the package that a module belongs to; "" for the package's own names, None for other packages."""
    if module != "cce_precision" and not module.startswith("cce_precision."):
        return None
    first = module.split(".")[1] if "." in module else ""
    return first if first in RANKS else ""


def broken_arrows(own: str, found: Iterable[tuple[int, str]]) -> list[str]:
    """What part `own` must not import, of what it does."""
    broken = []
    for line, module in found:
        other = part(module)
        if module.partition(".")[0] in ("variants", "analysis", "tests"):
            broken.append(f"line {line} imports {module}: write cce_precision.{module}")
        elif other is not None and other != own and RANKS[other] >= RANKS[own]:
            broken.append(f"line {line}: {own or 'the package'} must not import {other or 'the package'}")
    return broken


@pytest.mark.parametrize(("name", "path"), list(sources()), ids=lambda x: x if isinstance(x, str) else "")
def test_a_module_imports_only_from_its_right(name: str, path: Path) -> None:
    own = name.partition(".")[0]
    assert own in RANKS, f"{name} has no rank: give it one here and in AGENTS.md"
    assert broken_arrows(own, imports(name, path)) == []


@pytest.mark.parametrize(
    ("code", "fine"),
    [
        ("from cce_precision.problem import Problem", False),
        ("from cce_precision import linear_cross_entropy", False),
        ("import cce_precision.analysis.cases", False),
        ("def f():\n    from cce_precision.interface import x", False),
        ("import variants", False),
        ("from analysis.cases import CASES", False),
        ("from cce_precision.numerics import Variant", True),
        ("from cce_precision.variants import baseline", True),
        ("import torch", True),
    ],
)
def test_the_arrow_check_sees_what_a_variant_must_not_import(code: str, fine: bool, tmp_path: Path) -> None:
    path = tmp_path / "made_up.py"
    path.write_text(code)
    assert (broken_arrows("variants", imports("variants.made_up", path)) == []) == fine


def test_the_library_brings_no_heavy_module() -> None:
    brought = modules_after("from cce_precision import linear_cross_entropy")
    assert roots(brought) & HEAVY == set()
    assert not {m for m in brought if m.startswith(("cce_precision.analysis", "cce_precision.cli"))}
    assert not roots(brought) & {"variants", "analysis"}


def test_help_and_the_table_of_variants_are_quick_to_import() -> None:
    brought = modules_after("import cce_precision.cli, cce_precision.variants")
    assert roots(brought) & (HEAVY - {"typer", "rich"}) == set()


def test_the_links_make_both_folders_subpackages() -> None:
    for name in ("variants", "analysis"):
        link = PACKAGE / name
        assert link.is_symlink() and os.readlink(link) == f"../{name}"


# -- packaging ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tracked and untracked files, so that building leaves nothing behind."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    copy = tmp_path_factory.mktemp("source")
    for name in filter(None, listed.stdout.split("\0")):
        if name.startswith(("reports/", "tests/")) or not (ROOT / name).exists():
            continue
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to(os.readlink(ROOT / name))
        else:
            target.write_bytes((ROOT / name).read_bytes())
    return copy


def build(source: Path, out: Path) -> Path:
    """The wheel of `source`, a folder or an sdist."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        str(source),
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "-w",
        str(out),
    ]
    done = subprocess.run([*command, "--disable-pip-version-check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


def files_of(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_all_and_works_elsewhere(source: Path, tmp_path: Path) -> None:
    wheel = build(source, tmp_path / "wheel")
    found = files_of(wheel)
    wanted = {
        f"cce_precision/{name.replace('.', '/')}" for name, path in sources() if path.name != "__init__.py" and name
    }
    assert {f"{name}.py" for name in wanted} <= found
    data = [p for folder in ("data", "templates") for p in (source / "analysis" / folder).rglob("*") if p.is_file()]
    assert {f"cce_precision/{p.relative_to(source)}" for p in data} <= found
    assert "cce_precision/py.typed" in found
    assert not {name for name in found if not name.startswith("cce_precision/")}

    elsewhere = tmp_path / "elsewhere"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(elsewhere)
    code = (
        "import torch, cce_precision, cce_precision.variants, cce_precision.analysis.references as r;"
        "from cce_precision.variants import ALL;"
        "loss = cce_precision.linear_cross_entropy(torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 1]));"
        "print(cce_precision.__file__, r.__file__, len(ALL), float(loss))"
    )
    where, analysis, count, loss = fresh(code, elsewhere).split()
    assert Path(where).is_relative_to(elsewhere) and Path(analysis).is_relative_to(elsewhere)
    assert int(count) == len(cce_precision.variants.ALL)
    assert float(loss) > 0


@pytest.mark.slow
def test_the_sdist_makes_the_same_wheel(source: Path, tmp_path: Path) -> None:
    code = f"import setuptools.build_meta as b; print(b.build_sdist({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (sdist,) = tmp_path.glob("*.tar.gz")
    assert files_of(build(sdist, tmp_path / "from-sdist")) == files_of(build(source, tmp_path / "from-source"))


def test_the_version_is_one() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^version = "(.+)"$', text, re.M)[1] == cce_precision.__version__  # type: ignore[index]


def test_every_extra_of_the_command_exists() -> None:
    from cce_precision.cli import EXTRAS

    text = (ROOT / "pyproject.toml").read_text()
    section = text[text.index("[project.optional-dependencies]") : text.index("[project.scripts]")]
    extras = set(re.findall(r"^(\w+) = \[", section, re.M))
    assert {"report", "transformers", "bench", "ray", "dev", "all"} <= extras
    assert set(EXTRAS.values()) <= extras


# -- documentation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cce_precision.__all__)
def test_public_names_are_documented(name: str) -> None:
    thing = getattr(cce_precision, name)
    text = inspect.getdoc(thing) or ""
    assert text and not text.startswith(f"{name}("), f"{name} has no docstring of its own"


def test_every_module_says_what_it_is() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for _, path in sources()
        if path.stat().st_size and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []


def test_the_commands_that_the_documents_name_exist() -> None:
    known = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    named = {
        (document, command)
        for document in ("README.md", "AGENTS.md", "Makefile")
        if (ROOT / document).exists()
        for command in COMMAND.findall((ROOT / document).read_text())
    }
    assert {pair for pair in named if pair[1] not in known} == set()


def test_documented_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.M))
    named = {
        (document, target)
        for document in ("README.md", "AGENTS.md", ".ci/run")
        if (ROOT / document).exists()
        for target in re.findall(r"\bmake ([a-z][a-z-]*)", (ROOT / document).read_text())
    }
    assert {pair for pair in named if pair[1] not in targets} == set()
    assert {"venv", "report", "test", "test-gpu", "lint", "fuzz"} <= targets


def test_kernels_round_by_round_to() -> None:
    """Triton's interpreter truncates to bf16: what a portable kernel narrows goes through primitives.round_to."""
    kernels = [p for p in (ROOT / "cce_precision/kernels").glob("*.py") if not p.name.startswith("hopper")]
    found = {p.name: len(re.findall(r"\.to\([^()]*(?:element_ty|DTYPE|bfloat16)\)", p.read_text())) for p in kernels}
    assert found.pop("primitives.py") >= 2 and not any(found.values()), found


def test_files_and_functions_stay_small() -> None:
    """At most 500 lines a file, fewer than 120 lines and at most 28 parameters a function (AGENTS.md)."""
    too_long = []
    for _, path in sources():
        text = path.read_text()
        if text.count("\n") > 500:
            too_long.append(f"{path.relative_to(ROOT)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (length := code_lines(node)) >= 120:
                too_long.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.name} has {length} lines")
    assert too_long == []


def code_lines(node: ast.FunctionDef) -> int:
    """Lines of a function without its signature and docstring."""
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_without_typer_the_command_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['typer'] = None; sys.argv = ['cce-precision', 'variants']\n"
        "from cce_precision.cli import main\nmain()"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 1
    assert "'typer'" in done.stderr and "cce-precision[report]" in done.stderr and "Traceback" not in done.stderr


def test_without_a_package_a_command_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def miss(name: str) -> None:
        def app(**_: object) -> None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        monkeypatch.setattr("cce_precision.cli.app", app)

    miss("ray.util")
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "'ray'" in (said := capsys.readouterr().err) and "cce-precision[ray]" in said
    miss("nobody_knows")
    with pytest.raises(ModuleNotFoundError):
        main()
