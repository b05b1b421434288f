"""What a cluster gets: the compiled pipeline, compared whole with the one that was reviewed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

GOLDEN = Path(__file__).parent / "golden"
IMAGE = "registry.example.com/graftwork-python@sha256:" + "0" * 64


def compiled(folder: Path, *options: str) -> str:
    path = folder / "pipeline.yaml"
    subprocess.run(
        [sys.executable, "-m", "graftwork.pipelines.cli", "compile", "--output", str(path), "--image", IMAGE, *options],
        check=True,
        capture_output=True,
        cwd=folder,
    )
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "options"), [("pipeline", []), ("pipeline-with-scratch", ["--with-scratch-control"])])
def test_compiled_pipeline_is_the_reviewed_one(name: str, options: list[str], tmp_path: Path) -> None:
    """A change of what runs on clusters must be seen by a person: GOLDEN_UPDATE=1 writes the files anew, for review."""
    text = compiled(tmp_path, *options)
    golden = GOLDEN / f"{name}.yaml"
    if os.environ.get("GOLDEN_UPDATE"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    spec, platform = yaml.safe_load_all(compiled(tmp_path_factory.mktemp("compiled")))
    return spec, platform


def test_every_step_has_what_a_cluster_needs(documents: tuple[dict, dict]) -> None:
    """A step without resources, a deadline or a user is evicted, hangs for ever, or is refused by the admission policy."""
    spec, platform = documents
    executors = spec["deploymentSpec"]["executors"]
    kubernetes = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert len(executors) == 7 and set(kubernetes) == set(executors)
    for name, executor in executors.items():
        container = executor["container"]
        assert container["image"] == IMAGE
        assert container["resources"]["memoryLimit"] and container["resources"]["cpuRequest"], name
        assert kubernetes[name]["activeDeadlineSeconds"] in ("7200", "86400")
        assert kubernetes[name]["securityContext"] == {"runAsUser": "1000", "runAsGroup": "1000", "runAsNonRoot": True}
        assert kubernetes[name]["secretAsEnv"][0]["optional"] is True
    for task in spec["root"]["dag"]["tasks"].values():
        assert task["retryPolicy"]["maxRetryCount"] == 2


def test_what_may_change_is_never_cached(documents: tuple[dict, dict]) -> None:
    """A cluster's cache knows artifacts by name: a cached ingest or training would give last month's model for new data."""
    tasks = documents[0]["root"]["dag"]["tasks"]
    cached = {name for name, task in tasks.items() if task.get("cachingOptions", {}).get("enableCache")}
    assert cached == {"extract-features"}  # validation looks at the champion, which is no parameter
    for name in cached:
        assert "dataset_digest" in tasks[name]["inputs"]["parameters"]


def test_no_secret_and_no_path_of_this_machine_is_in_the_file(documents: tuple[dict, dict], tmp_path: Path) -> None:
    """The file goes to a shared server: what is in it is read by others."""
    text = compiled(tmp_path)
    assert str(Path(__file__).parent.parent.parent) not in text and str(tmp_path) not in text
    assert "GRAFTWORK_BUILD" not in text and "GRAFTWORK_JOURNALS" not in text
