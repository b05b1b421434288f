"""A step: how it ends is told as it was."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BODY = """
import os, signal, time
from graftwork.errors import UserError
from graftwork.steps import step
with step("ingest_data") as journal:
    try:
        if {stop}:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        raise KeyError
    except BaseException as error:
        {end}
"""


def run(folder: Path, end: str, stop: bool = True) -> tuple[int, list[dict[str, str]]]:
    environment = os.environ | {"GRAFTWORK_JOURNALS": str(folder)}
    done = subprocess.run([sys.executable, "-c", BODY.format(end=end, stop=stop)], env=environment, timeout=60)
    lines = (folder / "ingest_data.jsonl").read_text().splitlines()
    return done.returncode, [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    "end",
    [
        "raise",
        "raise RuntimeError('in a callback') from error",
        "raise UserError('weights: not a file') from error",
        "raise BrokenPipeError(32, 'Broken pipe') from error",
        "raise OSError(28, 'No space left on device') from error",
        "raise MemoryError from error",
        "raise SystemExit(1) from error",
    ],
)
def test_a_step_that_is_stopped_is_told_as_stopped(tmp_path: Path, end: str) -> None:
    """An error that a library, or we, made of Ctrl-C would have the user look for a defect that there is not."""
    status, events = run(tmp_path, end)
    assert status == 130
    assert events[-1]["event"] == "end" and events[-1]["status"] == "KILLED"
    assert [e["message"] for e in events if e["event"] == "error"] == ["interrupted"]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("UserError('weights: not a file')", "weights: not a file"),
        ("OSError(28, 'No space left on device', 'here')", "disk full while writing here"),
        ("MemoryError", "out of memory"),
        ("ValueError('odd')", "ValueError: odd"),
    ],
)
def test_a_step_that_fails_is_told_as_failed(tmp_path: Path, error: str, says: str) -> None:
    """A failure that looks like a stop of the user's own making would never be looked into."""
    status, events = run(tmp_path, f"raise {error}", stop=False)
    assert status == 1
    assert events[-1]["event"] == "end" and events[-1]["status"] == "FAILED"
    (message,) = [e["message"] for e in events if e["event"] == "error"]
    assert says in message
