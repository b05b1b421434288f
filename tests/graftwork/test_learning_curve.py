"""The learning curve: the figures it is read for, that it is whole, and that a curve which was stopped costs nothing twice."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY
from rich.console import Console

from graftwork import finetune
from graftwork.errors import UserError
from graftwork.learning_curve import (
    CANDIDATES,
    Cell,
    apart,
    check_labels,
    curve_folder,
    headline,
    interval,
    parse_numbers,
    reach,
    savings,
    sentence,
    summarise,
    times,
)
from graftwork.pipelines.cli import pipeline_parameters
from graftwork.pipelines.learning_curve import only_one, run_curve

SCRATCH = [(10, 0.5, 10.0), (100, 0.8, 100.0)]


# ---- the two figures -----------------------------------------------------------------------------------------------------------


def test_savings_are_read_off_the_line_through_the_points() -> None:
    """A factor that is computed wrong is the one number that everybody quotes."""
    # 0.8 lies half-way from 0.7 to 0.9, so half-way from 10 to 1000 labels and from 20 to 80 seconds, on logarithmic scales.
    found = savings([(10, 0.7, 20.0), (1000, 0.9, 80.0)], [(10, 0.5, 10.0), (1000, 0.8, 400.0)])
    assert found["bound"] == "" and found["target"] == {"per_class": 1000, "test_accuracy": 0.8, "seconds": 400.0}
    assert found["labels"] == pytest.approx(100) and found["labels_factor"] == pytest.approx(10)
    assert found["seconds"] == pytest.approx(40) and found["time_factor"] == pytest.approx(10)
    said = sentence("fine-tuned", found)
    assert "0.800 at 1000 labels a class" in said and "with 100 labels a class: 10 times fewer labels" in said
    assert "10 times less time (40 s against 400 s)" in said


def test_best_accuracy_of_scratch_need_not_be_its_last() -> None:
    """By noise, the most labels are not always the best: the target is what was reached, with the fewest labels that reached it."""
    found = savings([(10, 0.6, 5.0), (100, 0.9, 50.0)], [(10, 0.5, 10.0), (30, 0.8, 30.0), (100, 0.8, 90.0)])
    assert found["target"]["per_class"] == 30


def test_below_the_measured_range_it_says_at_least() -> None:
    """Where the fewest labels are enough, nobody measured how few would be: "10 times" would be made up."""
    found = savings([(10, 0.85, 20.0), (100, 0.9, 80.0)], SCRATCH)
    assert found["bound"] == "at least" and found["labels"] == 10 and found["labels_factor"] == 10
    said = sentence("fine-tuned", found)
    assert "already with 10 labels a class, the fewest measured: at least 10 times fewer labels" in said
    assert "at least 5.0 times less time" in said


def test_beyond_the_measured_range_it_says_more_than() -> None:
    """Where transfer does not reach the accuracy, a page that still claims a saving is a lie."""
    found = savings([(10, 0.6, 20.0), (100, 0.7, 80.0)], SCRATCH)
    assert found["bound"] == "less than" and found["labels_factor"] == 1 and found["time_factor"] is None
    said = sentence("fine-tuned", found)
    assert "is not reached with 100 labels a class, the most measured; more than that are needed" in said
    assert "times fewer" not in said
    assert "does not reach" in headline({"savings": {"fine_tuned": found}})


def test_one_size_alone_claims_no_factor() -> None:
    """A single size cannot tell how many labels are saved; "at least 1.0 times fewer" would say nothing in many words."""
    found = savings([(100, 0.9, 50.0)], [(100, 0.8, 100.0)])
    assert found["bound"] == "at least" and "only smaller sizes can tell" in sentence("fine-tuned", found)
    assert "no more labels" in headline({"savings": {"fine_tuned": found}})


def test_factors_below_one_are_said_the_other_way_round() -> None:
    """ "0.5 times less time" is read as a gain."""
    assert times(0.5, "", "time") == "2.0 times more time"
    assert times(0.5, "at least", "time") == "at most 2.0 times more time"
    assert times(12.4, "at least", "labels") == "at least 12 times fewer labels"
    assert (
        times(1.01, "", "time") == "about the same time"
        and times(1.0, "", "labels") == "about the same number of labels"
    )


def test_the_first_crossing_counts_and_an_exact_hit_is_one() -> None:
    """A curve that dips after it arrived has arrived; a measured point needs no interpolation."""
    points = [(10, 0.5, 1.0), (20, 0.7, 2.0), (40, 0.65, 4.0), (80, 0.9, 8.0)]
    assert reach(points, 0.7) == (20, 2.0, "")
    assert reach(points, 0.6).labels == pytest.approx(math.sqrt(200))


def test_intervals_join_seeds_and_test_images() -> None:
    """Three seeds that agree by luck say nothing of other test images, and one large test set nothing of other seeds."""
    assert interval([0.8], [[0.77, 0.82]], 0.95) == pytest.approx([0.77, 0.82])
    agree = interval([0.8, 0.8, 0.8], [[0.77, 0.82]] * 3, 0.95)
    assert agree == pytest.approx([0.77, 0.82])
    # Student's t for two degrees of freedom is 4.303; the standard error of 0.78, 0.80, 0.82 is 0.02 / sqrt(3).
    spread = interval([0.78, 0.8, 0.82], [[0.78, 0.78], [0.8, 0.8], [0.82, 0.82]], 0.95)
    assert spread == pytest.approx([0.8 - 4.303 * 0.02 / math.sqrt(3), 0.8 + 4.303 * 0.02 / math.sqrt(3)], abs=1e-4)


def test_chosen_is_compared_with_the_baseline_of_its_own_seed() -> None:
    """Means of different seeds would hide a choice that lost points."""
    points = [
        {
            "per_class": 10,
            "seed": seed,
            "candidate": name,
            "test_accuracy": accuracy,
            "test_accuracy_interval": [accuracy, accuracy],
            "test_macro_f1": accuracy,
            "val_accuracy": 0.5,
            "seconds": 1.0,
            "chosen": name == chosen,
        }
        for seed, chosen, values in ((0, "fine_tuned", (0.7, 0.68, 0.2)), (1, "baseline", (0.6, 0.5, 0.2)))
        for name, accuracy in zip(CANDIDATES, values, strict=True)
    ]
    (row,) = summarise(points, 0.95)
    assert row["chosen_minus_baseline"]["mean"] == pytest.approx(-1.0)
    assert row["chosen_minus_baseline"]["worst"] == pytest.approx(-2.0)
    assert row["chosen"] == {"baseline": 1, "fine_tuned": 1, "scratch": 0}
    assert row["candidates"]["chosen"]["test_accuracy"] == pytest.approx(0.64)


def test_names_at_the_ends_of_curves_do_not_cover_each_other() -> None:
    """Two names printed over each other leave both curves unnamed."""
    moved = apart({"a": 0.90, "b": 0.901, "c": 0.5}, 0.05)
    assert moved["b"] - moved["a"] >= 0.0499 and moved["c"] == 0.5


# ---- a whole curve -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    """The environment as it was, afterwards: MLflow's is set for the whole process."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Every training of a network, as (strategy, training images, seed); the real one runs."""
    begun: list[tuple[str, int, int]] = []
    real = finetune.fine_tune

    def counted(dataset: Any, baseline: Path, settings: Any, *rest: Any, **named: Any) -> Any:
        begun.append((settings.strategy, len(dataset.split("train")), settings.seed))
        return real(dataset, baseline, settings, *rest, **named)

    monkeypatch.setattr(finetune, "fine_tune", counted)
    return begun


def parameters(weights: Path) -> dict[str, Any]:
    options = {"data": "digits", "backbone": TINY, "weights": str(weights), "image_size": 32, "test_per_class": 8}
    found = pipeline_parameters(options, ["flip=false", "epochs=1", "views=1", "resamples=100", "plan_seconds=0"])
    return {**found, "source_fingerprint": "named:digits:1"}


def curve(weights: Path, output: Path, sizes: list[int], seeds: list[int]) -> tuple[dict[str, Any], str]:
    shown = StringIO()
    found = run_curve(parameters(weights), sizes, seeds, output, Console(file=shown, width=160))
    return found, shown.getvalue()


@pytest.fixture(scope="module")
def made(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """A curve of two sizes and two seeds, what it printed, and its output folder."""
    output = tmp_path_factory.mktemp("curve")
    return *curve(weights, output, [8, 4], [0, 1]), output


def test_the_curve_has_every_point_and_every_file(made: tuple[dict[str, Any], str, Path]) -> None:
    """A point that is missing bends the curve, and nobody sees it."""
    found, shown, output = made
    wanted = {(n, seed, name) for n in (4, 8) for seed in (0, 1) for name in CANDIDATES}
    assert [(p["per_class"], p["seed"], p["candidate"]) for p in found["points"]] == sorted(
        wanted, key=lambda p: (p[0], p[1], CANDIDATES.index(p[2]))
    )
    assert all(0 <= p["test_accuracy"] <= 1 and p["seconds"] > 0 for p in found["points"])
    assert sum(p["chosen"] for p in found["points"]) == 4
    folder = output / found["run_id"]
    assert {p.name for p in folder.iterdir()} == {"curve.json", "curve.csv", "curve.png", "report.html"}
    assert json.loads((folder / "curve.json").read_text(encoding="utf-8"))["rows"] == found["rows"]
    assert len((folder / "curve.csv").read_text(encoding="utf-8").splitlines()) == 1 + 2 * (len(CANDIDATES) + 1)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in page and 'src="http' not in page
    assert shown.count(" a class  seed ") == 12, "a line a point where there is no terminal"


def test_sizes_are_nested_and_share_their_test_images(weights: Path, tmp_path: Path) -> None:
    """On other test images, or other training images, a difference between two sizes is not the labels' doing."""
    from graftwork.dataset import open_dataset
    from graftwork.learning_curve import pack

    values = parameters(weights)
    held = {}
    for size in (4, 8):
        pack(values, Cell(size, 1), tmp_path, lambda stage, done, total: None)
        data = open_dataset(tmp_path / f"{Cell(size, 1)}.work" / "dataset")
        held[size] = {split: set(data.split(split)["id"].to_pylist()) for split in ("train", "val", "test")}
    assert held[4]["train"] < held[8]["train"] and held[4]["val"] <= held[8]["val"]
    assert held[4]["test"] == held[8]["test"] and len(held[4]["test"]) == 80


def test_mlflow_has_the_curve_and_a_run_for_each_point(made: tuple[dict[str, Any], str, Path]) -> None:
    """Points that are not nested, or have no params, cannot be filtered or charted by the one who compares curves."""
    from mlflow import MlflowClient

    found, _, _ = made
    uri = found["mlflow"]["tracking_uri"]
    client, parent = MlflowClient(uri, uri), found["mlflow"]["parent_run_id"]
    children = client.search_runs([found["mlflow"]["experiment_id"]], f"tags.mlflow.parentRunId = '{parent}'")
    asked = {tuple(r.data.params[k] for k in ("per_class", "seed", "candidate")): r for r in children}
    assert len(children) == len(asked) == 12 and {r.info.status for r in children} == {"FINISHED"}
    point = found["points"][4]
    run = asked[str(point["per_class"]), str(point["seed"]), point["candidate"]]
    for key in ("test_accuracy", "test_macro_f1", "seconds", "val_accuracy"):
        assert run.data.metrics[key] == pytest.approx(point[key])
    assert run.inputs.dataset_inputs[0].dataset.digest == run.data.tags["graftwork.dataset_digest"]

    top = client.get_run(parent)
    assert top.info.status == "FINISHED" and top.data.params["per_class"] == "[4, 8]"
    drawn = {m.step: m.value for m in client.get_metric_history(parent, "fine_tuned_accuracy")}
    assert drawn == {
        row["per_class"]: pytest.approx(row["candidates"]["fine_tuned"]["test_accuracy"]) for row in found["rows"]
    }
    assert {"curve.png", "curve.csv", "curve.json", "report.html"} == {a.path for a in client.list_artifacts(parent)}
    assert top.data.tags["graftwork.parent"] != "true", "'graftwork compare' would list it as a run with no candidates"


def test_an_interrupted_curve_goes_on_where_it_stopped(
    weights: Path, tmp_path: Path, trainings: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour of training that is lost to Ctrl-C is an hour she will not give us twice."""
    from mlflow import MlflowClient

    counted = finetune.fine_tune

    def stopped(dataset: Any, baseline: Path, settings: Any, *rest: Any, **named: Any) -> Any:
        if len(trainings) == 3:  # within the second cell: its baseline and its fine-tuned network are done
            raise KeyboardInterrupt
        return counted(dataset, baseline, settings, *rest, **named)

    with monkeypatch.context() as patched:
        patched.setattr(finetune, "fine_tune", stopped)
        with pytest.raises(KeyboardInterrupt):
            curve(weights, tmp_path, [4, 8], [0])
    assert [t[0] for t in trainings] == ["auto", "scratch", "auto"]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("learning-curve")] == [], (
        "nothing half-made is left"
    )
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = MlflowClient(uri, uri)
    experiment = client.get_experiment_by_name("graftwork").experiment_id
    assert not client.search_runs([experiment], "attributes.status = 'RUNNING'")

    found, shown = curve(weights, tmp_path, [4, 8], [0])
    assert [t[0] for t in trainings] == ["auto", "scratch", "auto", "scratch"], "only what was missing was trained"
    assert len(found["points"]) == 6 and shown.count("reused") == 3

    again, shown = curve(weights, tmp_path, [4, 8, 6], [0])
    assert [t[1] for t in trainings[4:]] == [60, 60], "a size that is added later is the only one trained"
    assert again["measured_now"] == 1 and shown.count("reused") == 6
    assert not list((tmp_path / ".cache").rglob("*.work")), "models of finished cells are not kept"


def test_the_same_curve_is_measured_by_one_process_at_a_time(tmp_path: Path) -> None:
    """A curve started twice by mistake would end hours later, with an error about files that the other had moved."""
    with (
        only_one(tmp_path, tmp_path / "runs"),
        pytest.raises(UserError, match=r"being measured there; wait for it, or give another --output"),
        only_one(tmp_path, Path("runs")),
    ):
        pass
    with only_one(tmp_path, tmp_path / "runs"):
        pass


def test_other_settings_data_or_code_share_no_points(weights: Path, tmp_path: Path) -> None:
    """A point of other settings on the curve is worse than none."""
    values = parameters(weights)
    first = curve_folder(values, tmp_path, "a")
    assert curve_folder({**values, "seed": 5, "register_as": "x"}, tmp_path, "a") == first, "these change no point"
    others = [
        curve_folder(values, tmp_path, "b"),
        curve_folder({**values, "epochs": 2}, tmp_path, "a"),
        curve_folder({**values, "source_fingerprint": "other"}, tmp_path, "a"),
    ]
    changed = tmp_path / "weights.safetensors"
    changed.write_bytes(weights.read_bytes())
    here = {**values, "weights": str(changed)}
    before = curve_folder(here, tmp_path, "a")
    os.utime(changed, (1, 1))
    others += [before, curve_folder(here, tmp_path, "a")]
    assert len({first, *others}) == 6


# ---- what is refused -----------------------------------------------------------------------------------------------------------


def test_classes_with_few_images_are_named_or_refused(weights: Path, tmp_path: Path) -> None:
    """A point "at 300 a class" that had 120 is a wrong point; found out after an hour, it is a lost hour as well."""
    with pytest.raises(UserError, match=r"per-class 5000: no class has more than \d+ training examples"):
        curve(weights, tmp_path, [4, 5000], [0])
    assert not list(tmp_path.rglob("*.work")) and not (tmp_path / "mlflow.db").exists()

    from PIL import Image

    for label, count in {"many": 20, "few": 8}.items():
        (tmp_path / "photos" / label).mkdir(parents=True)
        for n in range(count):
            Image.new("RGB", (32, 32), (n * 9, len(label) * 20, 7)).save(tmp_path / "photos" / label / f"{n}.png")
    values = {**parameters(weights), "data": str(tmp_path / "photos"), "source_fingerprint": "photos"}
    notes = check_labels(values, [Cell(3, 0), Cell(10, 0)], tmp_path / "cells", lambda cell: lambda *progress: None)
    assert len(notes) == 1 and "fewer training examples than asked, so these give all they have: few " in notes[0]
    assert "many" not in notes[0]


@pytest.mark.parametrize("text", ["", "5,", "five", "5,0", "-5", "5.5", "1e3", "²", "5,10,5", "9" * 5000, "5;10"])
def test_sizes_that_are_none_are_one_line(text: str) -> None:
    """A typing mistake must not train anything, nor print a trace."""
    with pytest.raises(UserError) as error:
        parse_numbers(text, "--per-class", 1)
    assert "--per-class" in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


def test_numbers_are_read_as_written() -> None:
    """Spaces after commas are how people write lists."""
    assert parse_numbers("5, 10,30", "--per-class", 1) == [5, 10, 30]
    assert parse_numbers("0", "--seeds", 0) == [0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data", "nowhere/"], "no such folder"),
        (["--data", "digits", "--per-class", "many"], "--per-class 'many'"),
        (["--data", "digits", "--seeds", "0,a"], "--seeds '0,a'"),
        (["--data", "digits", "--set", "seed=3"], "give them with --seeds"),
        (["--data", "digits", "--set", "strategy=scratch"], "strategy=scratch"),
    ],
)
def test_the_command_refuses_in_one_line(arguments: list[str], says: str, tmp_path: Path) -> None:
    """A mistake is one line and status 2, and leaves nothing behind."""
    found = subprocess.run(
        [sys.executable, "-m", "graftwork.pipelines.cli", "learning-curve", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert found.returncode == 2 and found.stderr.count("\n") == 1 and found.stderr.startswith("graftwork:")
    assert says in found.stderr and not list(tmp_path.iterdir())


def test_help_has_an_example(tmp_path: Path) -> None:
    """Help without an example sends her to the README."""
    found = subprocess.run(
        [sys.executable, "-m", "graftwork.pipelines.cli", "learning-curve", "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert found.returncode == 0 and "graftwork learning-curve --data my-photos/" in found.stdout
