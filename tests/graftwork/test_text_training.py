"""Texts through the code that images use: features, the probe, fine-tuning, evaluation; the same weights every time, and after every interruption."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="pip install 'graftwork[text]'")

from text_networks import make_folder, make_table

from graftwork.baseline import train_baseline
from graftwork.batches import Examples
from graftwork.dataset import Dataset, open_dataset
from graftwork.evaluate import evaluate
from graftwork.features import extract_features
from graftwork.finetune import fine_tune
from graftwork.ingest import ingest
from graftwork.model import load_model, predict_logits, read_info, read_tensors
from graftwork.settings import EvaluateSettings, FeatureSettings, FineTuneSettings, IngestSettings

QUICK = {"epochs": 3, "batch_size": 16, "learning_rate": 3e-3, "plan_seconds": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    place = tmp_path_factory.mktemp("texts")
    ingest(IngestSettings(data=str(make_table(place / "reviews.csv", per_class=60))), place / "dataset")
    return open_dataset(place / "dataset")


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("networks") / "bert", "bert")


def features(data: Dataset, network: Path, place: Path, **settings) -> dict:
    given = {"backbone": "small", "weights": str(network), "plan_seconds": 0}
    return extract_features(data, FeatureSettings(**(given | settings)), place)


@pytest.fixture(scope="module")
def baseline(data: Dataset, network: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("baseline")
    features(data, network, place / "embeddings")
    train_baseline(place / "embeddings", place / "model")
    return place / "model"


@pytest.fixture(scope="module")
def tuned(data: Dataset, baseline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tuned") / "model"
    fine_tune(data, baseline, FineTuneSettings(**QUICK), place)
    return place


def test_features_are_in_the_order_of_the_data(data: Dataset, network: Path, tmp_path: Path) -> None:
    """Texts pass through the network by length: were their rows left so, every label would be another text's."""
    info = features(data, network, tmp_path / "e")
    backbone = load_model(tmp_path / "e" / "backbone")
    rows = np.load(tmp_path / "e" / "features-train.npy")[0]
    examples = Examples(data, "train", backbone.preprocess)
    with torch.no_grad():
        for n in (0, 1, len(examples) - 1):
            one = backbone.preprocess.to_input(examples[torch.tensor([n])], torch.device("cpu"))
            np.testing.assert_allclose(rows[n], backbone.network.forward_features(one)[0].numpy(), atol=1e-5)
    assert info["modality"] == "text" and info["views"] == 1 and info["augmentation"] == {}


def test_what_is_cut_off_is_counted_and_told(data: Dataset, network: Path, tmp_path: Path) -> None:
    """A label that stands in the last sentence cannot be learned where texts are cut, and nobody would know why."""
    said: list[str] = []
    given = FeatureSettings(backbone="small", weights=str(network), max_length=8, plan_seconds=0)
    info = extract_features(data, given, tmp_path / "e", note=said.append)
    assert 0.5 < info["remarks"]["cut_texts_share"] < 1
    assert any("longer than 8 tokens and are cut" in line for line in said)
    assert features(data, network, tmp_path / "whole")["remarks"]["cut_texts"] == 0


def test_fine_tuning_learns_what_frozen_features_do_not_show(data: Dataset, baseline: Path, tmp_path: Path) -> None:
    """Fine-tuning that changes nothing is time for nothing: a random network's features know no words."""
    tuned = tmp_path / "model"
    fine_tune(
        data, baseline, FineTuneSettings(**(QUICK | {"epochs": 30, "learning_rate": 1e-2, "layer_decay": 1.0})), tuned
    )
    examples = Examples(data, "test", load_model(tuned).preprocess)
    accuracy = {
        name: float((predict_logits(load_model(path), examples).argmax(1) == examples.targets.numpy()).mean())
        for name, path in (("baseline", baseline), ("tuned", tuned))
    }
    assert accuracy["tuned"] > accuracy["baseline"]
    info = read_info(tuned)
    assert info["modality"] == "text" and (tuned / "tokenizer.json").is_file()
    assert info["selection"]["epoch"] > 0


def test_the_same_weights_every_time(data: Dataset, baseline: Path, tuned: Path, tmp_path: Path) -> None:
    """Without that, no difference between two runs means anything."""
    assert (
        fine_tune(data, baseline, FineTuneSettings(**QUICK), tmp_path / "again")["sha256"] == read_info(tuned)["sha256"]
    )
    other = fine_tune(data, baseline, FineTuneSettings(**QUICK, seed=1), tmp_path / "other")
    assert other["sha256"] != read_info(tuned)["sha256"]


@pytest.mark.parametrize("stop", [1, 7, 13])
def test_a_run_that_is_stopped_ends_with_the_same_weights(
    stop: int, data: Dataset, baseline: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout, the order and the lengths in a batch are drawn: all of it must be drawn again as it would have been."""
    monkeypatch.setenv("GRAFTWORK_CHECKPOINTS", str(tmp_path / "checkpoints"))
    settings = FineTuneSettings(**QUICK, checkpoint_seconds=1e-9)

    def stopping(done: int, total: int) -> None:
        if done == stop + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fine_tune(data, baseline, settings, tmp_path / "model", progress=stopping)
    said: list[str] = []
    found = fine_tune(data, baseline, settings, tmp_path / "model", note=said.append)
    assert any(f"goes on from a checkpoint: step {stop}" in line for line in said)
    assert found["sha256"] == read_info(tuned)["sha256"]


def test_features_that_were_stopped_go_on(data: Dataset, network: Path, tmp_path: Path, monkeypatch) -> None:
    """A million texts are an hour: a spot node that goes must not cost it."""
    from graftwork import features as module

    monkeypatch.setattr(module, "BATCH", 16)
    features(data, network, tmp_path / "whole")
    monkeypatch.setenv("GRAFTWORK_CHECKPOINTS", str(tmp_path / "checkpoints"))
    given = FeatureSettings(backbone="small", weights=str(network), plan_seconds=0)

    def stopping(done: int, total: int) -> None:
        if done >= 48:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract_features(data, given, tmp_path / "e", progress=stopping)
    seen: list[int] = []
    extract_features(data, given, tmp_path / "e", progress=lambda done, total: seen.append(done))
    assert seen[0] >= 48
    for split in ("train", "val"):
        name = f"features-{split}.npy"
        assert (tmp_path / "e" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_where_no_epoch_is_better_the_baseline_is_kept(data: Dataset, baseline: Path, tmp_path: Path) -> None:
    """The probe that epochs are judged by has not learned from validation: on few labels it is points below the baseline."""
    ruinous = FineTuneSettings(**(QUICK | {"learning_rate": 3.0, "warmup": 0.0, "patience": 1}))
    info = fine_tune(data, baseline, ruinous, tmp_path / "model")
    assert info["selection"]["epoch"] == 0
    final, kept = (read_tensors(path, read_info(path)) for path in (baseline, tmp_path / "model"))
    for name, tensor in final.items():
        np.testing.assert_allclose(kept[name], tensor, atol=1e-6, err_msg=name)


def test_batches_have_texts_of_like_length(data: Dataset, network: Path, tmp_path: Path) -> None:
    """Half of the time would go into what fills up batches; and an epoch must still show every text once."""
    features(data, network, tmp_path / "e")
    preprocess = load_model(tmp_path / "e" / "backbone").preprocess
    examples = Examples(data, "train", preprocess)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0))
    arranged = examples.by_length(order, 8, torch.Generator().manual_seed(0))
    assert sorted(arranged.tolist()) == sorted(order.tolist())

    def filled(order: torch.Tensor) -> int:
        return sum(
            batch.numel() - int(preprocess.lengths(batch).sum()) for batch in map(examples.__getitem__, order.split(8))
        )

    assert filled(arranged) < 0.4 * filled(order)
    assert not torch.equal(arranged, examples.by_length(order, 8, torch.Generator().manual_seed(1)))


def test_new_top_layers_are_trained_from_the_pretrained_ones_below(
    data: Dataset, baseline: Path, tmp_path: Path
) -> None:
    info = fine_tune(data, baseline, FineTuneSettings(**QUICK, reset_layers=1), tmp_path / "model")
    assert "half_way" not in info["averages"], "half way between old and new layers is nowhere"
    assert np.isfinite(info["history"][-1]["train_loss"])


def test_the_evaluation_is_that_of_images_with_texts_for_pictures(data, baseline, tuned, tmp_path: Path) -> None:
    found = evaluate(data, {"baseline": baseline, "fine_tuned": tuned}, EvaluateSettings(), tmp_path / "evaluation")
    assert set(found["candidates"]) == {"baseline", "fine_tuned"} and found["chosen"]
    assert all(one["text"] and "picture" not in one for one in found["mistakes"])
    page = (tmp_path / "evaluation" / "report.html").read_text(encoding="utf-8")
    assert "test examples" in page and "test images" not in page
    assert (
        json.loads((tmp_path / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))["mistakes"]
        == found["mistakes"]
    )
