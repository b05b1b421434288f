"""Registration, against a real MLflow store: who becomes champion, and that the registered model is the evaluated one."""

import base64
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from graftwork.dataset import Dataset
from graftwork.evaluate import evaluate
from graftwork.model import load_model, read_info, read_tensors, save_model
from graftwork.predicting import find_examples, label_examples, model_folder
from graftwork.settings import EvaluateSettings, RegisterSettings


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory):
    """A registry of its own for this file, with its artifacts beside it."""
    import os

    from graftwork.tracking import Follower, quiet_mlflow

    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    os.environ["MLFLOW_TRACKING_URI"] = uri
    quiet_mlflow()
    follower = Follower(folder / "journals", uri, folder, "parent", {"graftwork.run": "test"})
    (folder / "journals").mkdir()
    follower._round()
    yield follower
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        os.environ.pop(name, None)


def run_id(store) -> str:
    return store.client().create_run(store.experiment_id).info.run_id


def judged(dataset: Dataset, models: dict[str, Path], folder: Path) -> Path:
    evaluate(dataset, models, EvaluateSettings(resamples=100), folder)
    return folder


def worse(model: Path, folder: Path) -> Path:
    """A copy of ``model`` with another head, which knows nothing."""
    info = read_info(model)
    tensors = read_tensors(model, info)
    head = f"{info['head']}.weight"
    tensors[head] = np.random.default_rng(0).normal(size=tensors[head].shape).astype(np.float32)
    save_model(
        folder, tensors, {k: v for k, v in info.items() if k not in ("sha256", "versions", "parameters", "format")}
    )
    return folder


def rule(result, name: str):
    return next(rule for rule in result["decision"]["rules"] if rule["rule"] == name)


def register(dataset, evaluation: Path, models, store, name: str, **settings):
    from graftwork.register import register as do

    return do(dataset, evaluation, models, RegisterSettings(register_as=name, **settings), lambda: run_id(store))


@pytest.fixture(scope="module")
def first(dataset, baseline, store, tmp_path_factory):
    """The baseline, registered under a name of its own: the first version, the champion."""
    evaluation = judged(dataset, {"baseline": baseline}, tmp_path_factory.mktemp("first") / "evaluation")
    return evaluation, register(dataset, evaluation, {"baseline": baseline}, store, "digits model")


def test_first_model_is_champion(first) -> None:
    """With nothing in service yet, the first proved model must be."""
    _, result = first
    assert result["decision"]["promoted"] is True and "no champion before" in " ".join(result["decision"]["reasons"])
    assert result["registered"] == {"name": "digits model", "version": 1, "aliases": ["champion"]}


def test_same_model_makes_no_second_version(first, dataset, baseline, store) -> None:
    """A retried step, or a run on unchanged data, would fill the registry with copies."""
    evaluation, _ = first
    again = register(dataset, evaluation, {"baseline": baseline}, store, "digits model")
    assert again["registered"]["version"] == 1 and again["decision"]["promoted"] is False
    assert "already" in again["decision"]["reasons"][0]


def test_registered_model_gives_the_evaluations_probabilities(first, dataset, store) -> None:
    """Skew between evaluation and service is the classic silent loss; the four ways to send an image must agree."""
    import mlflow

    evaluation, _ = first
    expected = pq.read_table(evaluation / "predictions-baseline.parquet").to_pandas().head(6)
    columns = [f"p_{c}" for c in dataset.classes]
    mlflow.set_tracking_uri(store.uri)
    model = mlflow.pyfunc.load_model("models:/digits model@champion")
    images = list(dataset.read(dataset.split("test").slice(0, 6)))
    files = []
    for n, data in enumerate(images):
        path = evaluation.parent / f"{n}.png"
        path.write_bytes(data)
        files.append(path)
    from PIL import Image

    python_model = model.unwrap_python_model()
    for inputs in (
        pd.DataFrame({"image": images}),
        [base64.b64encode(i).decode() for i in images],
        [str(f) for f in files],
        [np.asarray(Image.open(f)) for f in files],
    ):
        found = model.predict(inputs) if isinstance(inputs, pd.DataFrame) else python_model.predict(None, inputs)
        assert found["label"].tolist() == expected["predicted"].tolist()
        np.testing.assert_allclose(found[columns].to_numpy(), expected[columns].to_numpy(), atol=1e-5)
    loaded, broken = load_model(model_folder("models:/digits model@champion", store.uri)), []
    rows = list(
        label_examples(loaded, find_examples([str(f) for f in files], "image"), lambda *one: broken.append(one))
    )
    assert loaded.classes == dataset.classes and not broken
    np.testing.assert_allclose(np.concatenate([r.probabilities for r in rows]), expected[columns].to_numpy(), atol=1e-5)


def test_registered_version_holds_no_pickle_and_says_where_it_comes_from(
    first, dataset, baseline, store, tmp_path
) -> None:
    """A registry that unpickles, or does not say which data made the model, cannot be trusted."""
    import mlflow

    mlflow.set_tracking_uri(store.uri)
    local = Path(mlflow.artifacts.download_artifacts("models:/digits model/1", dst_path=str(tmp_path)))
    names = [p.name for p in local.rglob("*") if p.is_file()]
    assert "model.safetensors" in names and "predictor.py" in names
    assert not [n for n in names if n.endswith((".pkl", ".pickle", ".pt", ".pth", ".bin"))]
    version = store.client().get_model_version("digits model", "1")
    assert version.tags["graftwork.dataset_digest"] == dataset.digest
    assert version.tags["graftwork.model_sha256"] == read_info(baseline)["sha256"]
    declared = mlflow.models.get_model_info("models:/digits model/1").signature
    assert declared.inputs.input_names() == ["image"] and "label" in declared.outputs.input_names()


def test_the_champions_data_is_what_later_data_is_compared_with(first, dataset, store) -> None:
    """A user's next run would be compared with nothing, or with itself."""
    from graftwork.drift import champion_profile, profile

    found = champion_profile("digits model", store.uri)
    assert found == profile(dataset) | {"champion": "digits model version 1"}


def test_worse_challenger_does_not_replace_the_champion(first, dataset, baseline, store, tmp_path) -> None:
    """A bad retraining would go into service."""
    bad = worse(baseline, tmp_path / "bad")
    evaluation = judged(dataset, {"baseline": bad}, tmp_path / "evaluation")
    result = register(dataset, evaluation, {"baseline": bad}, store, "digits model")
    assert result["decision"]["promoted"] is False and rule(result, "champion")["passed"] is False
    assert "not beaten" in rule(result, "champion")["reason"]
    assert result["registered"]["aliases"] == ["challenger"]
    assert store.client().get_model_version_by_alias("digits model", "champion").version == "1" or (
        int(store.client().get_model_version_by_alias("digits model", "champion").version) == 1
    )


def test_champion_is_evaluated_now_and_not_by_its_record(dataset, baseline, store, tmp_path) -> None:
    """A champion whose recorded figure is a lie (or of another test set) would never be replaced, or always."""
    bad = worse(baseline, tmp_path / "bad")
    evaluation = judged(dataset, {"baseline": bad}, tmp_path / "evaluation")
    register(dataset, evaluation, {"baseline": bad}, store, "liar")
    store.client().set_model_version_tag("liar", "1", "test_accuracy", "0.999")
    better = judged(dataset, {"baseline": baseline}, tmp_path / "better")
    result = register(dataset, better, {"baseline": baseline}, store, "liar")
    assert result["decision"]["promoted"] is True and "beaten" in rule(result, "champion")["reason"]
    assert result["registered"]["aliases"] == ["champion"]
    kept = register(dataset, evaluation, {"baseline": bad}, store, "liar")
    assert kept["decision"]["promoted"] is False and kept["registered"]["version"] == 1


def test_fine_tuned_model_must_beat_the_baseline(dataset, baseline, store, tmp_path) -> None:
    """A fine-tuned model that lost to a linear probe on the test would be served all the same."""
    bad = worse(baseline, tmp_path / "bad")
    evaluation = judged(dataset, {"baseline": baseline, "fine_tuned": bad}, tmp_path / "evaluation")
    content = json.loads((evaluation / "evaluation.json").read_text())
    content["chosen"] = "fine_tuned"
    (evaluation / "evaluation.json").write_text(json.dumps(content))
    result = register(dataset, evaluation, {"baseline": baseline, "fine_tuned": bad}, store, "loser")
    assert result["decision"]["promoted"] is False and "less than the baseline" in result["decision"]["reasons"][0]
    assert result["registered"]["aliases"] == ["challenger"]


def test_champion_with_other_classes_gives_a_decision(dataset, baseline, tuned, store, tmp_path) -> None:
    """Another label set must not crash the run, nor be compared as if it were the same."""
    from graftwork.dataset import open_dataset

    evaluation = judged(dataset, {"baseline": baseline}, tmp_path / "evaluation")
    register(dataset, evaluation, {"baseline": baseline}, store, "other classes")
    folder = tmp_path / "data"
    shutil.copytree(dataset.folder, folder)
    renamed = open_dataset(folder)
    renamed = renamed._replace(info={**renamed.info, "classes": [*dataset.classes[:-1], "new"]})
    after = judged(dataset, {"fine_tuned": tuned}, tmp_path / "after")
    result = register(renamed, after, {"fine_tuned": tuned}, store, "other classes")
    assert result["decision"]["promoted"] is False and result["champion"] is None
    assert "its classes are others: -9, +new" in rule(result, "champion")["reason"]
    assert result["registered"]["aliases"] == ["challenger"]


def test_champion_that_cannot_be_loaded_gives_a_decision(dataset, baseline, tuned, store, tmp_path) -> None:
    """A deleted artifact must not stop the retraining, nor hand the title to whoever comes."""
    import mlflow

    evaluation = judged(dataset, {"baseline": baseline}, tmp_path / "evaluation")
    register(dataset, evaluation, {"baseline": baseline}, store, "gone")
    found = store.client().get_model_version("gone", "1")
    files = mlflow.artifacts.download_artifacts(f"models:/{found.name}/1")
    for path in Path(files).rglob("model.json"):
        path.unlink()
    after = judged(dataset, {"fine_tuned": tuned}, tmp_path / "after")
    result = register(dataset, after, {"fine_tuned": tuned}, store, "gone")
    assert result["decision"]["promoted"] is False and result["champion"] is None
    assert "graftwork promote" in rule(result, "champion")["reason"]


def test_the_champions_figures_are_its_own(dataset, baseline, tuned, store, tmp_path) -> None:
    """A sample that many copy reads the champion's figures from the challenger: it compares a model with itself, and promotes by luck."""
    from sklearn.metrics import accuracy_score

    first = judged(dataset, {"baseline": baseline}, tmp_path / "first")
    register(dataset, first, {"baseline": baseline}, store, "own figures")
    second = judged(dataset, {"fine_tuned": tuned}, tmp_path / "second")
    result = register(dataset, second, {"fine_tuned": tuned}, store, "own figures")
    own, challenger = (
        pq.read_table(folder / f"predictions-{name}.parquet").to_pandas()
        for folder, name in ((first, "baseline"), (second, "fine_tuned"))
    )
    expected = accuracy_score(own["label"], own["predicted"])
    assert result["champion"]["version"] == 1
    assert result["champion"]["score"]["accuracy"] == pytest.approx(expected)
    assert result["champion"]["comparison"]["theirs"] == pytest.approx(expected)
    assert result["champion"]["comparison"]["only_mine_right"] == (challenger["correct"] & ~own["correct"]).sum()
    assert not np.array_equal(own["predicted"], challenger["predicted"]), "the test would prove nothing"


def test_version_has_a_card_from_the_runs_facts(first, store) -> None:
    """A version without a word of what it is for and how good it is, is used for the wrong thing."""
    evaluation, result = first
    told = store.client().get_model_version("digits model", "1").description
    accuracy = json.loads((evaluation / "evaluation.json").read_text())["candidates"]["baseline"]["test"]["accuracy"]
    assert told == result["card"] and f"{100 * accuracy:.1f} %" in told and len(told) <= 5000
    assert "Promoted" in told and "models:/digits model@champion" in told


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("models:/nobody@champion", "has none"),
        ("models:/digits model@nobody", "has none"),
        ("models:/digits model/77", "has none"),
        ("models:/digits", "write models:/NAME@ALIAS"),
        ("/nowhere", "no such folder"),
    ],
)
def test_model_that_is_not_there(model: str, message: str, store, first) -> None:
    """A typing mistake in a name would end in a trace of MLflow's."""
    from graftwork.errors import UserError

    with pytest.raises(UserError, match=message):
        model_folder(model, store.uri)
