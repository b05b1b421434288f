"""``infra/component_step.py``: a compiled component runs by its own command, outside KFP, on what the ones before it left."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "infra" / "component_step.py"


def step(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | environment,
    )


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline as it goes to a cluster."""
    path = tmp_path_factory.mktemp("compiled") / "pipeline.yaml"
    command = [sys.executable, "-m", "graftwork.pipelines.cli", "compile", "--output", str(path), "--image", "x:1"]
    subprocess.run(command, check=True, capture_output=True, cwd=path.parent)
    return path


def test_steps_come_after_what_they_need(compiled: Path) -> None:
    """A component that is tried before its input is there fails for a reason that is none."""
    names = step(compiled).stdout.split()
    assert set(names) >= {
        "ingest-data",
        "validate-data",
        "extract-features",
        "train-baseline",
        "fine-tune",
        "register-model",
    }
    order = ["ingest-data", "extract-features", "train-baseline", "fine-tune", "evaluate-model", "register-model"]
    assert [name for name in names if name in order] == order


def test_components_run_by_the_compiled_command(compiled: Path, tmp_path: Path) -> None:
    """What the image is given to run on a cluster is this very command; here it meets real data, and hands on values and files."""
    # The image has python3 on its PATH, with the package; here that is this interpreter.
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "python3").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
    (tools / "python3").chmod(0o755)
    work = tmp_path / "work"
    options = ["data=digits", "train_per_class=12", "test_per_class=6", "reference=none"]
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    for place in (
        "CHECKPOINTS",
        "STORE",
        "KEPT_JOURNALS",
    ):  # on the volume that the pipeline mounts, which this machine has not
        environment[f"GRAFTWORK_{place}"] = str(tmp_path / place)
    for name in ("ingest-data", "validate-data"):
        done = step(compiled, work, name, *options, **environment)
        assert done.returncode == 0, done.stderr[-2000:]
    digest = json.loads((work / "ingest-data" / "executor_output.json").read_text("utf-8"))["parameterValues"]["Output"]
    assert len(digest) >= 16 and (work / "ingest-data" / "dataset" / "manifest.parquet").is_file()
    assert (work / "validate-data" / "report").read_text("utf-8").lstrip().startswith("<!")


def test_a_step_before_its_time_says_so(compiled: Path, tmp_path: Path) -> None:
    """The reason that a person reads in the test's list must be the reason."""
    done = step(compiled, tmp_path, "fine-tune")
    assert done.returncode == 1 and "has not run yet" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["nothing"], "is not among"), (["ingest-data", "dta=digits"], "has no parameter dta")],
)
def test_a_name_that_is_not_there_is_told(compiled: Path, tmp_path: Path, arguments: list[str], told: str) -> None:
    """A misspelt setting would be ignored, and the pod would work on other data for hours."""
    done = step(compiled, tmp_path, *arguments)
    assert done.returncode != 0 and told in done.stderr and "Traceback" not in done.stderr


def pipeline(tmp_path: Path, **changes: Any) -> Path:
    """A pipeline of two steps, the second in a nested one, as an exit handler makes it."""
    write = ["sh", "-c", 'mkdir -p $(dirname $1); printf %s "$0" > $1', "{{$}}"]
    container = {"container": {"image": "x:1", "command": write, "args": [str(tmp_path / "SEEN")]}}
    first = {
        "componentRef": {"name": "comp-first"},
        "inputs": {"parameters": {"n": {"componentInputParameter": "n"}}},
        **changes,
    }
    second = {
        "componentRef": {"name": "comp-second"},
        "dependentTasks": ["first"],
        "inputs": {
            "parameters": {"value": {"taskOutputParameter": {"producerTask": "first", "outputParameterKey": "Output"}}},
            "artifacts": {"file": {"taskOutputArtifact": {"producerTask": "first", "outputArtifactKey": "file"}}},
        },
    }
    last = {
        "componentRef": {"name": "comp-last"},
        "dependentTasks": ["inner"],
        "triggerPolicy": {"strategy": "ALL_UPSTREAM_TASKS_COMPLETED"},
        "inputs": {"parameters": {"status": {"taskFinalStatus": {"producerTask": "inner"}}}},
    }
    kind = {"artifactType": {"schemaTitle": "system.Artifact"}}
    spec = {
        "root": {
            "inputDefinitions": {"parameters": {"n": {"defaultValue": 3.0, "parameterType": "NUMBER_INTEGER"}}},
            "dag": {
                "tasks": {
                    "inner": {
                        "componentRef": {"name": "comp-inner"},
                        "inputs": {"parameters": {"n": {"componentInputParameter": "n"}}},
                    },
                    "last": last,
                }
            },
        },
        "components": {
            "comp-inner": {"dag": {"tasks": {"first": first, "second": second}}},
            "comp-first": {
                "executorLabel": "run",
                "outputDefinitions": {"parameters": {"Output": {}}, "artifacts": {"file": kind}},
            },
            "comp-second": {
                "executorLabel": "run",
                "inputDefinitions": {
                    "parameters": {"value": {}, "more": {"defaultValue": "d"}},
                    "artifacts": {"file": kind},
                },
            },
            "comp-last": {"executorLabel": "run", "inputDefinitions": {"parameters": {"status": {}}}},
        },
        "deploymentSpec": {"executors": {"run": container}},
    }
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump(spec), encoding="utf-8")
    return path


def test_nested_pipelines_and_the_exit_step(tmp_path: Path) -> None:
    """An exit handler wraps the whole pipeline into another: its steps would not be found, and none be tried."""
    path, work = pipeline(tmp_path), tmp_path / "work"
    assert step(path).stdout.split() == ["first", "second", "last"]
    assert step(path, work, "first", "n=5").returncode == 0
    assert json.loads((tmp_path / "SEEN").read_text("utf-8"))["inputs"]["parameterValues"] == {"n": 5}
    left = {
        "parameterValues": {"Output": "abc"},
        "artifacts": {"file": {"artifacts": [{"name": "file", "metadata": {"digest": "d1"}}]}},
    }
    (work / "first" / "executor_output.json").write_text(json.dumps(left), encoding="utf-8")
    assert step(path, work, "second").returncode == 0
    seen = json.loads((tmp_path / "SEEN").read_text("utf-8"))["inputs"]
    assert seen["parameterValues"] == {"value": "abc", "more": "d"}
    assert seen["artifacts"]["file"]["artifacts"][0]["uri"] == str(work / "first" / "file")
    assert seen["artifacts"]["file"]["artifacts"][0]["metadata"] == {"digest": "d1"}
    assert step(path, work, "last").returncode == 0
    assert (
        json.loads((tmp_path / "SEEN").read_text("utf-8"))["inputs"]["parameterValues"]["status"]["state"]
        == "SUCCEEDED"
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"triggerPolicy": {"condition": "inputs.parameter_values['n'] == 3"}}, "condition"),
        ({"parameterIterator": {"itemInput": "n"}}, "loop"),
    ],
)
def test_what_only_kfp_decides_is_refused(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    """A step behind a condition that is run anyhow is a test of something else."""
    done = step(pipeline(tmp_path, **change))
    assert done.returncode == 1 and told in done.stderr and "Traceback" not in done.stderr
