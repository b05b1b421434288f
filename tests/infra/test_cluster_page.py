"""``docs/cluster.md``: its commands of ours are taken by our programs, and what it names is there."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "cluster.md").read_text("utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
SHELL = "\n".join(BLOCKS).replace("\\\n", " ")
OURS = [line.split(" #")[0].strip() for line in SHELL.splitlines() if line.startswith("graftwork ")]


@pytest.mark.parametrize("line", OURS)
def test_commands_of_ours_are_real(line: str, tmp_path: Path) -> None:
    """Whoever copies a command of the page must get to the cluster with it: all that may be wrong here is that none answers."""
    command = [sys.executable, "-m", "graftwork.pipelines.cli", *shlex.split(line)[1:]]
    environment = os.environ | {"GRAFTWORK_KFP_HOST": "http://127.0.0.1:1", "NO_COLOR": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path)
    assert done.returncode == 2 and "http://127.0.0.1:1: cannot be reached" in done.stderr, done.stdout + done.stderr


def test_the_page_has_the_commands_of_a_schedule() -> None:
    """Without lines to look at, the test above looks at none."""
    assert {line.split()[1] for line in OURS} >= {"submit", "schedule", "status"}


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\b(?:infra|mlflow|tests)/[\w./-]*[\w/]", PAGE))))
def test_files_that_it_names_are_there(path: str) -> None:
    """A path that has moved sends its reader looking."""
    if path not in {"mlflow/mlflow"}:
        assert (ROOT / path).exists()


def test_targets_of_make_are_there() -> None:
    """`make kind-up` is the first thing that anybody types."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = set(re.findall(r"\bmake (kind-\w+|lint)\b", PAGE))
    assert named == {"kind-up", "kind-test", "kind-down", "lint"} and named <= targets


def test_options_of_the_scripts_are_real(tmp_path: Path) -> None:
    """A script that refuses the page's own option is the page's fault."""
    (tmp_path / "FOLDER").mkdir()
    lines = [line.split(" #")[0].strip() for line in SHELL.splitlines()]
    lines = [line for line in lines if line.startswith(("infra/install.sh", "infra/test-cluster.sh"))]
    assert len(lines) == 3
    environment = os.environ | {"PYTHON": "/nowhere", "GRAFTWORK": "/nowhere", "GRAFTWORK_IMAGE": "x:1"}
    for line in lines:
        script = f"{ROOT}/{line} --dry-run"
        done = subprocess.run(
            ["bash", "-c", script], capture_output=True, text=True, timeout=60, env=environment, cwd=tmp_path
        )
        assert done.returncode == 0, f"{line}: {done.stderr}"


def test_every_check_is_listed() -> None:
    """A list that has lost a check promises less than is done; one that has one more, what nobody does."""
    listed = re.findall(r"^  (\S.*?): \d", PAGE.partition("```text")[2].partition("```")[0], re.MULTILINE)
    text = (ROOT / "infra" / "check.py").read_text("utf-8")
    named = re.findall(r'^    "([^"]+)": \w+,$', text[text.index("CHECKS: ") :], re.MULTILINE)
    assert listed == named and len(named) == 10


def test_every_secret_of_the_manifests_is_explained() -> None:
    """A Secret that nobody explains is filled with whatever works."""
    named = set()
    for folder in ("infra", "mlflow/kustomize"):
        for path in (ROOT / folder).rglob("*.yaml"):
            named |= set(
                re.findall(r"secretRef: \{name: ([\w-]+)|secretKeyRef: \{name: ([\w-]+)", path.read_text("utf-8"))
            )
    names = {name for pair in named for name in pair if name}
    names |= {"graftwork-mlflow", "graftwork-s3", "mlpipeline-minio-artifact", "kfp-mlflow-credentials"}
    assert len(names) >= 6
    assert [name for name in sorted(names) if f"`{name}`" not in PAGE] == []
