"""Steps forked from a process that has imported already: to the run, and to the step, it is as if Python had been started."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from graftwork.pipelines import warm

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forking is for Linux alone")

STEP = """
import atexit, json, os, signal, sys, threading, time
how = sys.argv[1]
if how == "tell":
    found = {"arguments": sys.argv[1:], "folder": os.getcwd(), "own": os.environ.get("OWN"), "gone": os.environ.get("GONE")}
    found |= {"imported": "colorsys" in sys.modules, "name": __name__, "read": sys.stdin.read()}
    print(json.dumps(found))
    print("to stderr", file=sys.stderr)
    atexit.register(print, "at exit")
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread ended"))).start()
    sys.exit(7)
if how == "fail":
    raise ValueError("a defect")
if how == "refuse":
    sys.exit("a reason")
if how == "wait":
    print(os.getpid(), flush=True)
    time.sleep(60)
"""


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """The socket of a warm process that has imported one module, and whose folder holds the step."""
    (tmp_path / "a_step.py").write_text(STEP)
    path = tmp_path / "steps"
    command = [sys.executable, "-m", "graftwork.pipelines.warm", "serve", str(path), "colorsys"]
    environment = os.environ | {"GONE": "once"}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=tmp_path, env=environment)
    while not path.exists():
        assert process.poll() is None, "it did not start"
        time.sleep(0.01)
    time.sleep(0.2)
    yield str(path)
    assert process.poll() is None, "one step must not end it"
    assert process.stdin
    process.stdin.close()  # as the kernel does when the run is killed
    assert process.wait(10) == 0, "it would stay behind, with a gigabyte of memory"


def command(address: str, *arguments: str) -> list[str]:
    return [sys.executable, "-I", "-S", warm.__file__, "ask", address, "-m", "a_step", *arguments]


def test_a_step_is_what_it_would_be_if_python_had_been_started(address: str, tmp_path: Path) -> None:
    """Another folder, environment, argument or stream, and her step would read or write something else; a lost status, and a failed
    step would count as finished.
    """
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "GONE"} | {"OWN": "ä\udcff"}
    done = subprocess.run(
        command(address, "tell", "--an argument", "ö"), cwd=folder, env=environment, input="given", capture_output=True, text=True
    )  # fmt: skip
    first, *rest = done.stdout.splitlines()
    assert json.loads(first) == {
        "arguments": ["tell", "--an argument", "ö"], "folder": str(folder), "own": "ä\udcff", "gone": None,
        "imported": True, "name": "__main__", "read": "given",
    }  # fmt: skip
    assert rest == ["thread ended", "at exit"], "it ended as Python ends"
    assert done.stderr.splitlines() == ["to stderr"] and done.returncode == 7


def test_a_step_that_fails_says_why(address: str) -> None:
    """Without its trace in the log, nobody could mend it."""
    done = subprocess.run(command(address, "fail"), capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.endswith("ValueError: a defect\n")
    done = subprocess.run(command(address, "refuse"), capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "a reason\n"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_a_step_that_is_killed_is_seen_to_be(address: str, number: signal.Signals) -> None:
    """When memory runs out, the run would wait for ever, or take the step for finished."""
    process = subprocess.Popen(command(address, "wait"), stdout=subprocess.PIPE, text=True)
    assert process.stdout
    os.kill(int(process.stdout.readline()), number)
    assert process.wait(10) == -number


def test_without_the_warm_process_the_command_is_the_step(tmp_path: Path) -> None:
    """If it were killed to free memory, no run would ever finish."""
    (tmp_path / "a_step.py").write_text(STEP)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        command(str(tmp_path / "nobody"), "tell"), cwd=tmp_path, env=environment, input="", capture_output=True, text=True
    )  # fmt: skip
    assert json.loads(done.stdout.splitlines()[0])["arguments"] == ["tell"] and done.returncode == 7


def test_what_is_imported_beforehand_starts_no_threads() -> None:
    """A thread that holds a lock when the process forks would leave a step waiting for ever."""
    code = (
        "import importlib, threading\n"
        f"for name in {warm.MODULES!r}: importlib.import_module(name)\n"
        "print(threading.active_count())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
