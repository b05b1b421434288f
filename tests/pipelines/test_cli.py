"""The command line, as typed: answers in one line, exit status, examples in the help."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from graftwork.errors import UserError
from graftwork.pipelines.cli import parse_value, pipeline_parameters


def graftwork(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "graftwork.pipelines.cli", *arguments], capture_output=True, text=True, cwd=cwd
    )


@pytest.mark.parametrize("command", ["run", "learning-curve", "compile", "predict", "compare", "ui", "settings"])
def test_help_is_there(command: str, tmp_path: Path) -> None:
    """Help without an example sends her to the README, help that crashes to another tool."""
    found = graftwork(command, "--help", cwd=tmp_path)
    assert found.returncode == 0
    if command != "settings":
        assert (
            f"graftwork {command} " in found.stdout.replace("Usage: graftwork", "")
            or "graftwork compare" in found.stdout
        )


def test_settings_lists_everything(tmp_path: Path) -> None:
    """A setting that is not listed is not found."""
    found = graftwork("settings", cwd=tmp_path).stdout
    for name in ("layer_decay", "max_broken", "train_per_class", "policy", "resamples", "interpolation"):
        assert name in found


def test_values_are_read_by_their_form() -> None:
    """--set mean=0.5,0.4,0.3 and --set flip=false must mean what they look like."""
    assert parse_value("0.5,0.4,0.3") == [0.5, 0.4, 0.3]
    assert parse_value("false") is False and parse_value("3") == 3 and parse_value("[1, 2]") == [1, 2]
    assert parse_value("bicubic") == "bicubic" and parse_value("a,b") == "a,b"
    for text, classes in (
        ("ant, bee", ["ant", "bee"]),
        ("1,2", ["1", "2"]),
        ("ant", ["ant"]),
        ('["a,b", "c"]', ["a,b", "c"]),
    ):
        assert pipeline_parameters({"data": "x"}, [f"classes={text}"])["classes"] == classes


def test_parameters_are_checked_before_anything_runs() -> None:
    """A mistake that shows after ten minutes of training costs ten minutes."""
    found = pipeline_parameters({"data": "x"}, ["batch-size=16", "mean=0.5,0.5,0.5", "flip=false"])
    assert found["batch_size"] == 16 and found["mean"] == [0.5, 0.5, 0.5] and found["flip"] == "no"
    for bad, message in {
        "batch_size=-1": "batch_size = -1",
        "batch_size=many": "batch_size",
        "batchsize=3": "did you mean batch_size",
        "layer_decay=nan": "layer_decay",
        "batch_size": "write KEY=VALUE",
        "source_fingerprint=x": "no such setting",
        "resize=stretch": "resize",
    }.items():
        with pytest.raises(UserError, match=message):
            pipeline_parameters({"data": "x"}, [bad])


def test_start_up_is_quick(tmp_path: Path) -> None:
    """A command line that thinks for seconds before it says anything feels broken."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        graftwork("--help", cwd=tmp_path)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 1.5


def test_compare_and_predict_without_runs(tmp_path: Path) -> None:
    """Asked before anything ran, they must say what to do first."""
    for arguments in (["compare"], ["predict", "models:/x@champion", "a.jpg"]):
        (tmp_path / "a.jpg").write_bytes(b"")
        found = graftwork(*arguments, cwd=tmp_path)
        assert found.returncode == 2 and found.stderr.count("\n") == 1 and found.stderr.startswith("graftwork:")


def test_compare_with_a_damaged_database(tmp_path: Path) -> None:
    """A trace of the database's library does not say which file to look at."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/mlflow.db").write_bytes(b"no database " * 100)
    for arguments in (["compare"], ["history", "x"]):
        found = graftwork(*arguments, cwd=tmp_path)
        assert found.returncode == 2 and found.stderr.count("\n") == 1, found.stderr
        assert "runs/mlflow.db" in found.stderr and "file is not a database" in found.stderr
