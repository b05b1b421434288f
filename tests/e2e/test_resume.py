"""A run that is killed with -9 in mid-training: the same command goes on, and ends with the same weights."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import TINY
from text_networks import make_folder, make_table

pytestmark = pytest.mark.e2e


@pytest.fixture(params=["image", "text"])
def command(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """A run that takes a while to train, and checkpoints all the time."""
    line = [
        sys.executable, "-m", "graftwork.pipelines.cli", "run", "--strategy", "full", "--epochs", "12", "--set", "batch_size=8",
        "--set", "patience=99", "--set", "checkpoint_seconds=0.5",
    ]  # fmt: skip
    if request.param == "image":
        weights = str(request.getfixturevalue("weights"))
        return [
            *line, "--data", "digits", "--train-per-class", "60", "--test-per-class", "10", "--backbone", TINY, "--weights", weights,
            "--image-size", "48",
        ]  # fmt: skip
    pytest.importorskip("transformers", reason="pip install 'graftwork[text]'")
    table = make_table(tmp_path / "reviews.csv", per_class=400)
    return [*line, "--data", str(table), "--backbone", str(make_folder(tmp_path / "small-bert", "bert"))]


def environment(cache: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "GRAFTWORK_"))}
    # Both runs shall find the same plan: timed anew, it might be another one, and with it the last bit of the weights.
    return kept | {"GRAFTWORK_CACHE": str(cache)}


def tuned_digest(folder: Path) -> str:
    summary = json.loads(sorted((folder / "runs").glob("*/summary.json"))[-1].read_text(encoding="utf-8"))
    return json.loads((Path(summary["files"]["fine_tuned"]) / "model.json").read_text(encoding="utf-8"))["sha256"]


def kill_everything(process: "subprocess.Popen[str]") -> None:
    """What an out-of-memory killer, a spot node or a power cut does: no process gets to say a word."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.send_signal(signal.SIGKILL)
    psutil.wait_procs(family, timeout=20)
    process.wait()


def test_killed_in_training_the_same_command_goes_on(command: list[str], tmp_path: Path) -> None:
    """Hours of training on a spot node would be lost, or worse: the run would end with other weights than it would have had."""
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    for folder in (undisturbed, killed):
        folder.mkdir()
    where = environment(tmp_path)
    subprocess.run(command, cwd=undisturbed, env=where, check=True, capture_output=True, timeout=600)

    process = subprocess.Popen(
        command, cwd=killed, env=where, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 300
    while not list((killed / "runs").glob(".cache/checkpoints/fine-tune-*/*.safetensors")):
        assert process.poll() is None and time.monotonic() < deadline, "no checkpoint was seen"
        time.sleep(0.05)
    time.sleep(1.0)
    assert process.poll() is None, "the run was over before it could be killed"
    kill_everything(process)

    again = subprocess.run(command, cwd=killed, env=where, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "fine_tune: goes on from a checkpoint" in again.stdout
    assert "extract frozen features: reused" in again.stdout
    assert tuned_digest(killed) == tuned_digest(undisturbed)
    assert not list((killed / "runs").glob(".cache/checkpoints/fine-tune-*")), (
        "checkpoints of a finished step are removed"
    )
