"""A step: how it ends is told as it was."""

import json
import os
import subprocess
import sys
from pathlib import Path

BODY = """
import os, signal, time
from graftwork.steps import step
with step("ingest_data") as journal:
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    except BaseException as error:
        {end}
"""


def run(folder: Path, end: str) -> tuple[int, list[dict[str, str]]]:
    environment = os.environ | {"GRAFTWORK_JOURNALS": str(folder)}
    done = subprocess.run([sys.executable, "-c", BODY.format(end=end)], env=environment, timeout=60)
    lines = (folder / "ingest_data.jsonl").read_text().splitlines()
    return done.returncode, [json.loads(line) for line in lines]


def test_a_step_that_is_stopped_is_told_as_stopped(tmp_path: Path) -> None:
    """A library that makes its own error of Ctrl-C would have the user look for a defect that there is not."""
    for n, end in enumerate(("raise", "raise RuntimeError('in a callback') from error")):
        (tmp_path / str(n)).mkdir()
        status, events = run(tmp_path / str(n), end)
        assert status == 130
        assert events[-1]["event"] == "end" and events[-1]["status"] == "KILLED"
        assert [e["message"] for e in events if e["event"] == "error"] == ["interrupted"]
