"""The command line: tables, JSON, and errors that say what is allowed and leave with exit code 2."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cce_precision.analysis.memory import row, rows
from cce_precision.analysis.shapes import MODELS, SHAPES, shape
from cce_precision.cli import app, names
from cce_precision.variants import ALL

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def plain(text: str) -> str:
    """Without the frame that rich draws around an error."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


def test_help_names_every_command() -> None:
    out = run("--help").output
    for command in ("variants", "report", "bench", "memory"):
        assert command in out


@pytest.mark.parametrize("command", [c.name or c.callback.__name__ for c in app.registered_commands if c.callback])
def test_every_command_has_help(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0 and "Usage" in result.output


def test_variants_prints_every_record() -> None:
    result = run("variants")
    assert result.exit_code == 0
    for name in ALL:
        assert name in result.output


def test_variants_as_json_are_the_records() -> None:
    records = json.loads(run("variants", "--json").output)
    assert [record["name"] for record in records] == list(ALL)
    exact = next(record for record in records if record["name"] == "cce_exact")
    assert exact["accum_e"] == "fp32" and exact["filter_e"]["kind"] == "none"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["variants", "--yaml"], "No such option: --yaml"),
        (["memory", "--model", "gemma2-2c"], "did you mean 'gemma2-2b'"),
        (["memory", "--model", "x"], "llama3-8b"),
        (["memory", "--gpus", "0"], "--gpus"),
        (["memory", "--tokens", "many"], "--tokens"),
        (["bench", "--device", "tpu"], "device must be auto, cpu or cuda, got 'tpu'"),
        (["bench", "--device", "cpu", "--shape", "gemma"], "known: gpt2"),
        (["bench", "--device", "cpu", "--shape", "gemma2-2c"], "did you mean 'gemma2-2b'"),
        (["bench", "--device", "cpu", "--shape", "0x4x4"], "three positive numbers"),
        (["bench", "--device", "cpu", "--shape", "gpt2@0"], "NAME@TOKENS"),
        (["bench", "--device", "cpu", "--shape", ""], "nothing to measure"),
        (["bench", "--device", "cpu", "--methods", "cce_exat"], "did you mean 'cce_exact'"),
        (["bench", "--device", "cpu", "--methods", "cce_exact@0MB"], "at least 1 MB"),
        (["bench", "--device", "cpu", "--methods", "nonsense@12MB"], "'nonsense'"),
        (["bench", "--device", "cpu", "--dtype", "int8"], "known: bf16, fp16, fp32"),
        (["bench", "--device", "cpu", "--case", "easy"], "known: init"),
        (["bench", "--device", "cpu", "--case", "captured", "--shape", "gpt2"], "one shape"),
        (["bench", "--device", "cpu", "--repeat", "-1"], "--repeat"),
    ],
)
def test_bad_options_leave_with_code_2_and_say_what_is_allowed(arguments: list[str], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert said in plain(result.output)
    assert "Traceback" not in result.output


def test_the_module_is_the_command() -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "cce_precision", "variants", "--json"], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0
    assert len(json.loads(done.stdout)) == len(ALL)


def test_a_list_between_commas() -> None:
    assert names(" a, b,,c ") == ["a", "b", "c"]
    assert names("") == []


def test_shapes_by_name_by_tokens_and_by_size() -> None:
    assert shape("gemma2-2b").softcap == 30.0
    assert shape("gemma2-2b", softcap=False).softcap is None
    assert shape("llama3-8b@1024").n == 1024
    small = shape("3x5x7")
    assert (small.n, small.v, small.d, small.softcap) == (3, 5, 7, None)
    assert set(MODELS) < set(SHAPES)


def test_memory_is_the_papers_accounting() -> None:
    """65,536 tokens of Gemma 2 (2B): 65,536 x 256,000 fp32 logits are 64,000 MiB; the rest follows in the same way."""
    gemma = row(MODELS["gemma2-2b"])
    assert gemma["logits_mib"] == 64000
    assert gemma["activations_mib"] == 65536 * 2304 * 26 * 2 / 2**20
    assert gemma["weights_mib"] == MODELS["gemma2-2b"].parameters * 8 / 2**20
    room = 16 * 75 * 2**30 - MODELS["gemma2-2b"].parameters * 8
    assert gemma["batch_with_logits"] == room // (2304 * 26 * 2 + 256000 * 4)
    assert gemma["batch_without_logits"] == room // (2304 * 26 * 2)
    every = rows()
    assert [one["model"] for one in every] == list(MODELS)
    assert all(one["increase"] > 1 for one in every)


def test_memory_prints_a_row_a_model() -> None:
    assert json.loads(run("memory", "--model", "gpt2", "--json").output)[0]["model"] == "gpt2"
    out = run("memory").output
    assert all(name in out for name in MODELS)
    assert (
        json.loads(run("memory", "--model", "llama2-13b", "--gpus", "1", "--json").output)[0]["batch_with_logits"] == 0
    )
