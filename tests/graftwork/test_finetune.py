"""Fine-tuning: what it keeps, what it changes, and that it can be repeated."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from graftwork.batches import SplitImages, augment
from graftwork.finetune import fine_tune, set_training_mode, starting_network
from graftwork.model import load_model, predict, read_info
from graftwork.settings import FineTuneSettings
from graftwork.strategies import Plan, choose_batch_size, choose_epochs, choose_strategy, freeze, plan


def changed(before: Path, after: Path, head: str) -> tuple[set[str], set[str]]:
    """Return (names outside the head that changed, those that did not)."""
    old, new = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    body = {k for k in old if not k.startswith(f"{head}.")}
    moved = {k for k in body if not np.array_equal(old[k], new[k])}
    return moved, body - moved


def test_same_seed_same_weights_bit_for_bit(dataset, baseline: Path, tuned: Path, tmp_path: Path) -> None:
    """A run that cannot be repeated proves nothing."""
    settings = FineTuneSettings(epochs=2, flip=False, strategy="full")
    again = fine_tune(dataset, baseline, settings, tmp_path / "again")
    assert again["sha256"] == read_info(tuned)["sha256"]
    other = fine_tune(dataset, baseline, settings.model_copy(update={"seed": 1}), tmp_path / "other")
    assert other["history"][1]["train_loss"] != again["history"][1]["train_loss"]


def test_batchnorm_statistics_stay_byte_identical(dataset, baseline: Path, tmp_path: Path) -> None:
    """Statistics of small batches would overwrite those of ImageNet: it costs ten points on small data."""
    settings = FineTuneSettings(epochs=1, strategy="full", learning_rate=0.01, patience=1)
    network = starting_network(baseline, read_info(baseline), Plan("full", 1, 8, 0.01, 0.9, []), 10)
    before = {k: v.clone() for k, v in network.named_buffers()}
    set_training_mode(network, frozen_statistics=True)
    network(torch.randn(8, 3, 32, 32) * 5)
    assert all(torch.equal(before[k], v) for k, v in network.named_buffers()) and len(before) > 10
    set_training_mode(network, frozen_statistics=False)
    network(torch.randn(8, 3, 32, 32) * 5)
    assert any(not torch.equal(before[k], v) for k, v in network.named_buffers()), "the check can fail"

    fine_tune(dataset, baseline, settings, tmp_path / "model")
    moved, _ = changed(baseline, tmp_path / "model", read_info(baseline)["head"])
    assert not any("running_" in name for name in moved)


@pytest.mark.parametrize("strategy", ["head", "last-blocks", "full"])
def test_strategy_trains_what_it_says(strategy: str, dataset, baseline: Path, tmp_path: Path) -> None:
    """A strategy that trains other layers than its name says would waste her time, or distort her features."""
    head = read_info(baseline)["head"]
    network = starting_network(baseline, read_info(baseline), Plan(strategy, 1, 8, 0.01, 0.9, []), 10)
    freeze(network, strategy, head)
    trained = {n for n, p in network.named_parameters() if p.requires_grad}
    everything = {n for n, _ in network.named_parameters()}
    heads = {n for n in everything if n.startswith(f"{head}.")}
    assert heads <= trained
    if strategy == "head":
        assert trained == heads
    elif strategy == "full":
        assert trained == everything
    else:
        assert heads < trained < everything

    settings = FineTuneSettings(epochs=3, strategy=strategy, learning_rate=0.003, ema_decay=0, flip=False, shift=0)
    info = fine_tune(dataset, baseline, settings, tmp_path / "model")
    if info["selection"]["epoch"]:
        moved, _ = changed(baseline, tmp_path / "model", head)
        assert {n for n in moved if "running_" not in n} <= trained - heads


def test_best_epoch_is_kept(dataset, baseline: Path, tmp_path: Path) -> None:
    """The last epoch is not the best one; and training that only does harm must leave the probe as it was."""
    ruinous = FineTuneSettings(
        epochs=3, strategy="full", learning_rate=3.0, layer_decay=1.0, ema_decay=0, warmup=0, patience=2
    )
    info = fine_tune(dataset, baseline, ruinous, tmp_path / "ruined")
    accuracies = [h["val_accuracy"] for h in info["history"]]
    assert info["selection"] == {"metric": "val_accuracy", "value": accuracies[0], "examples": 60, "epoch": 0}
    assert len(accuracies) <= 3, "stopped after two epochs without a better one"
    model = load_model(tmp_path / "ruined", "cpu")
    images = SplitImages(dataset, "val", model.preprocess)
    assert (predict(model, images).argmax(1) == images.targets.numpy()).mean() == accuracies[0]


def test_tuned_model_reloads_as_measured(dataset, tuned: Path) -> None:
    """The weights that are saved must be those that were measured, averaged ones included."""
    model, info = load_model(tuned, "cpu"), read_info(tuned)
    images = SplitImages(dataset, "val", model.preprocess)
    probabilities = predict(model, images)
    best = info["history"][info["selection"]["epoch"]]
    assert (probabilities.argmax(1) == images.targets.numpy()).mean() == pytest.approx(best["val_accuracy"])
    loss = -np.log(probabilities[np.arange(len(images)), images.targets.numpy()]).mean()
    assert loss == pytest.approx(best["val_loss"], abs=1e-4)


def test_scratch_starts_from_random_weights(dataset, baseline: Path, tmp_path: Path) -> None:
    """A control that secretly starts from pretrained weights would hide what transfer gains."""
    info = fine_tune(dataset, baseline, FineTuneSettings(strategy="scratch", epochs=1), tmp_path / "scratch")
    assert info["candidate"] == "scratch" and info["weights"]["source"] == "random"
    moved, same = changed(baseline, tmp_path / "scratch", info["head"])
    assert len([n for n in moved if n.endswith("weight")]) > 10
    assert not [n for n in same if n.endswith("conv1.weight")]


def test_augmentation_is_per_image_and_by_seed() -> None:
    """One draw for a whole batch would be far weaker; an unseeded one could not be repeated."""
    ramp = torch.arange(20, dtype=torch.uint8).view(1, 1, 20, 1).expand(64, 20, 20, 3).contiguous()
    out = augment(ramp, True, 0.1, torch.Generator().manual_seed(0))
    assert out.shape == ramp.shape and out.dtype == torch.uint8
    assert torch.equal(out, augment(ramp, True, 0.1, torch.Generator().manual_seed(0)))
    mirrored = out[:, 0, 5, 0] > out[:, 0, 15, 0]
    assert 16 < int(mirrored.sum()) < 48, "about half are mirrored"
    assert len({tuple(row.tolist()) for row in out[:, 0, :, 0]}) > 5, "shifts differ from image to image"
    assert torch.equal(augment(ramp, False, 0.0, torch.Generator()), ramp)


def test_rules_of_thumb() -> None:
    """With no knob touched, the plan decides whether she gets a good model: its rules must stay where they were measured."""
    assert choose_strategy(examples=20, classes=10) == "head"
    assert choose_strategy(examples=1000, classes=10) == "last-blocks"
    assert choose_strategy(examples=20_000, classes=10) == "full"
    assert choose_epochs(1000) == 6 and choose_epochs(50) == 20 and choose_epochs(1_000_000) == 3
    assert [choose_batch_size(n) for n in (20, 500, 1000, 50_000)] == [8, 16, 32, 64]
    left_open = plan(FineTuneSettings(), 1000, 10)
    assert left_open.strategy == "last-blocks" and len(left_open.reasons) == 4
    given = plan(FineTuneSettings(strategy="head", epochs=4, batch_size=32, learning_rate=0.1), 1000, 10)
    assert given == Plan("head", 4, 32, 0.1, 0.9, [])
    assert plan(FineTuneSettings(strategy="scratch"), 1000, 10).layer_decay == 1.0
