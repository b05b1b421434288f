"""Fine-tuning: what it keeps, what it changes, and that it can be repeated."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from scipy.special import softmax

from graftwork import backbones, finetune
from graftwork.augmentation import augment
from graftwork.backbones import build
from graftwork.batches import Examples
from graftwork.errors import UserError
from graftwork.finetune import fine_tune, load_start, set_training_mode
from graftwork.model import load_model, predict_logits, read_info
from graftwork.selection import METRICS, merit, rank
from graftwork.settings import FineTuneSettings
from graftwork.strategies import freeze

# On the 80 digits of ``few``, from a head of zeros and with the loss as the metric, every epoch is better than the start.
QUICK = {
    "epochs": 1, "batch_size": 16, "strategy": "full", "lp_ft": False, "metric": "loss", "learning_rate": 3e-3, "layer_decay": 1.0,
    "flip": False, "patience": 99, "ema_decay": 0, "plan_seconds": 0, "checkpoint_seconds": 0,
}  # fmt: skip


def quick(**given) -> FineTuneSettings:
    return FineTuneSettings(**(QUICK | given))


def started(baseline: Path, lp_ft: bool = True):
    """Return the network as fine-tuning starts from it."""
    info = read_info(baseline)
    network = build(info["backbone"], info["backbone_args"], len(info["classes"]))
    load_start(network, baseline, info, lp_ft)
    return network


def changed(before: Path, after: Path, head: str) -> tuple[set[str], set[str]]:
    """Return (names outside the head that changed, those that did not)."""
    old, new = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    body = {k for k in old if not k.startswith(f"{head}.")}
    moved = {k for k in body if not np.array_equal(old[k], new[k])}
    return moved, body - moved


def test_same_seed_same_weights_bit_for_bit(dataset, baseline: Path, tuned: Path, tmp_path: Path) -> None:
    """A run that cannot be repeated proves nothing."""
    settings = FineTuneSettings(epochs=2, flip=False, strategy="full", plan_seconds=0)
    again = fine_tune(dataset, baseline, settings, tmp_path / "again")
    assert again["sha256"] == read_info(tuned)["sha256"]
    other = fine_tune(dataset, baseline, settings.model_copy(update={"seed": 1}), tmp_path / "other")
    assert other["history"][1]["train_loss"] != again["history"][1]["train_loss"]


def test_batchnorm_statistics_stay_byte_identical(dataset, baseline: Path, tmp_path: Path) -> None:
    """Statistics of small batches would overwrite those of ImageNet: it costs ten points on small data."""
    settings = FineTuneSettings(epochs=1, strategy="full", learning_rate=0.01, patience=1)
    network = started(baseline)
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
    network = started(baseline)
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
    selection = {k: v for k, v in info["selection"].items() if k != "val"}
    assert selection == {"metric": "val_accuracy", "value": accuracies[0], "examples": 60, "epoch": 0}
    assert info["selection"]["val"]["val_accuracy"] == accuracies[0]
    assert set(info["selection"]["val"]) == {"val_accuracy", "val_macro_f1", "val_auroc", "val_loss"}
    assert len(accuracies) <= 3, "stopped after two epochs without a better one"
    model = load_model(tmp_path / "ruined", "cpu")
    images = Examples(dataset, "val", model.preprocess)
    assert (predict_logits(model, images).argmax(1) == images.targets.numpy()).mean() == accuracies[0]


def test_tuned_model_reloads_as_measured(dataset, tuned: Path) -> None:
    """The weights that are saved must be those that were measured, averaged ones included."""
    model, info = load_model(tuned, "cpu"), read_info(tuned)
    images = Examples(dataset, "val", model.preprocess)
    probabilities = softmax(predict_logits(model, images), axis=1)
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


@pytest.mark.parametrize("strategy", ["head", "last-blocks", "gradual", "full", "scratch"])
def test_no_strategy_touches_frozen_statistics(strategy: str, few, baseline: Path, tmp_path: Path) -> None:
    """One strategy that forgets to freeze them loses ten points on small data, and nobody sees why."""
    chosen = quick(strategy=strategy, epochs=2, batchnorm="frozen" if strategy == "scratch" else "auto", ema_decay=0.5)
    info = fine_tune(few, baseline, chosen, tmp_path / "model")
    assert info["selection"]["epoch"] > 0 and info["hyperparameters"]["batchnorm"] == "frozen"
    after = load_file(tmp_path / "model" / "model.safetensors")
    before = load_file(baseline / "model.safetensors")
    if strategy == "scratch":
        before = {k: v.numpy() for k, v in build(info["backbone"], {}, 10).state_dict().items()}
    buffers = [n for n, _ in started(baseline).named_buffers()]
    assert len(buffers) > 10 and all(after[n].tobytes() == before[n].tobytes() for n in buffers)


def test_trained_statistics_are_trained(few, baseline: Path, tmp_path: Path) -> None:
    """Whoever asks for them, since her images look nothing like ImageNet's, would get what she has already."""
    info = fine_tune(few, baseline, quick(batchnorm="trained", strategy="head", epochs=3), tmp_path / "model")
    assert info["selection"]["epoch"] > 0 and info["hyperparameters"]["batchnorm"] == "trained"
    moved, _ = changed(baseline, tmp_path / "model", info["head"])
    assert {n.rsplit(".", 1)[1] for n in moved} == {"running_mean", "running_var", "num_batches_tracked"}
    with pytest.raises(UserError, match="batch_size = 1"):
        fine_tune(few, baseline, quick(batchnorm="trained", batch_size=1), tmp_path / "one")


def test_head_starts_as_the_probe_or_at_zero(baseline: Path) -> None:
    """LP-FT that starts from a random head distorts the features: that is what it is there to prevent."""
    probe = load_file(baseline / "probe.safetensors")
    assert np.array_equal(started(baseline).fc.weight.detach().numpy(), probe["weight"])
    network = started(baseline, lp_ft=False)
    assert not network.fc.weight.any() and not network.fc.bias.any()
    body = load_file(baseline / "model.safetensors")
    assert np.array_equal(network.conv1[0].weight.detach().numpy(), body["conv1.0.weight"])


def difference(a: Path, b: Path) -> float:
    """Return how far two models' weights are from each other, as a share of the largest weight of the tensor."""
    one, other = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return float(max(np.abs(one[k] - other[k]).max() / (np.abs(one[k]).max() + 1e-9) for k in one))


@pytest.mark.parametrize("more", [{}, {"balance": "weights"}, {"mixup": 0.5}], ids=["plain", "weights", "mixup"])
def test_a_batch_in_parts_is_the_same_batch(
    more: dict, dataset, baseline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a small GPU, she would train with another batch size, or other weights of the classes, than on a large one."""
    uneven = [n for n in range(240) if n < 24 or n % 3 == 0]  # all of the first class, a third of the others
    part = dataset._replace(manifest=dataset.split("train").take(uneven))
    monkeypatch.setattr(finetune, "better", lambda *candidates: True)  # what was trained is compared, good or not
    chosen = quick(optimizer="sgd", learning_rate=0.02, clip_norm=0, **more)
    whole = fine_tune(part, baseline, chosen, tmp_path / "whole")
    assert whole["selection"]["epoch"] == 1
    fine_tune(part, baseline, chosen.model_copy(update={"micro_batch": 5}), tmp_path / "parts")
    fine_tune(part, baseline, chosen.model_copy(update={"batch_size": 5}), tmp_path / "small")
    apart, other = (difference(tmp_path / "whole", tmp_path / name) for name in ("parts", "small"))
    assert apart < 1e-3 < 0.03 < other, "smaller batches would show"


class Limited:
    """Makes ``build`` give networks that run out of memory above ``count`` examples."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        self.largest = 0

        def check(module, args) -> None:
            if len(args[0]) > count:
                raise torch.OutOfMemoryError("out of memory, says the test")
            if module.training:
                self.largest = max(self.largest, len(args[0]))

        def limited(*args, **kwargs):
            network = build(*args, **kwargs)
            network.register_forward_pre_hook(check)
            return network

        monkeypatch.setattr(backbones, "build", limited)


@pytest.mark.parametrize("seconds", [0, 5])
def test_out_of_memory_halves_what_runs_at_once_and_keeps_the_batch(
    seconds: int, few, baseline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that meets a smaller GPU would end, or go on with another batch size and be another run."""
    chosen = quick(precision="fp32", memory_format="channels_last", engine="eager", threads=1, plan_seconds=seconds)
    fine_tune(few, baseline, chosen.model_copy(update={"micro_batch": 4, "plan_seconds": 0}), tmp_path / "given")
    limited, said, steps = Limited(monkeypatch, 5), [], set()
    info = fine_tune(few, baseline, chosen, tmp_path / "halved", lambda done, total: steps.add(total), said.append)
    assert limited.largest == 4 and steps == {5}
    assert info["hyperparameters"]["batch_size"] == 16
    assert any("out of memory: 4 examples at once" in line and "batch size stays" in line for line in said)
    assert difference(tmp_path / "given", tmp_path / "halved") < 1e-6


def test_out_of_memory_that_nothing_helps_tells_what_to_do(
    few, baseline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trace of CUDA's, or an endless halving, tells nobody what to change."""
    Limited(monkeypatch, 0)
    with pytest.raises(UserError, match=r"single example.*image_size"):
        fine_tune(few, baseline, quick(), tmp_path / "none")
    Limited(monkeypatch, 10)
    with pytest.raises(UserError, match=r"batches of 16, which BatchNorm learns from.*batch_size"):
        fine_tune(few, baseline, quick(batchnorm="trained"), tmp_path / "whole")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("metric", METRICS)
def test_the_best_epoch_by_her_metric_is_kept_and_training_stops(
    metric: str, few, baseline: Path, tmp_path: Path
) -> None:
    """Asked for macro F1, she would get the epoch that is best by another figure, or wait for epochs that bring nothing."""
    chosen = quick(metric=metric, lp_ft=True, epochs=12, patience=2, learning_rate=3e-4, schedule="constant", warmup=0)
    info = fine_tune(few, baseline, chosen, tmp_path / "model")
    history, epoch = info["history"], info["selection"]["epoch"]
    ranks = [rank(metric, entry) for entry in history]
    assert epoch == ranks.index(max(ranks)) and info["selection"]["metric"] == f"val_{metric}"
    assert len(history) == epoch + 3 < 13, "two epochs after the best one"
    model = load_model(tmp_path / "model", "cpu")
    images = Examples(few, "val", model.preprocess)
    logits = predict_logits(model, images)
    found = finetune.measure(logits, images.targets.numpy(), METRICS)
    for name in METRICS:
        assert info["selection"]["val"][f"val_{name}"] == pytest.approx(found[f"val_{name}"], abs=1e-4)
    assert info["selection"]["value"] == pytest.approx(history[epoch][f"val_{metric}"], abs=1e-4)


def test_averages_are_never_worse_and_are_reported(few, baseline: Path, tmp_path: Path) -> None:
    """An average that is worse than the epoch it replaces costs what she trained for; one that is not reported cannot be explained."""
    chosen = quick(lp_ft=True, epochs=4, learning_rate=3e-4, optimizer="sgd", schedule="constant", warmup=0)
    alone = fine_tune(few, baseline, chosen, tmp_path / "alone")
    averaging = chosen.model_copy(update={"wise_ft": True, "soup": 3})
    both = fine_tune(few, baseline, averaging, tmp_path / "both")
    assert alone["averages"] == {} and set(both["averages"]) == {"wise_ft", "soup"}
    assert alone["selection"]["epoch"] > 0, "there was something to average"
    assert merit("loss", both["selection"]["val"]) >= merit("loss", alone["selection"]["val"])
    assert both["averages"]["wise_ft"] in (0.25, 0.5, 0.75, 1.0) and 1 <= both["averages"]["soup"] <= 3
    averaged = both["averages"] != {"wise_ft": 1.0, "soup": 1}
    assert averaged == (both["sha256"] != alone["sha256"]), "what is reported is what is saved"
    assert both["selection"]["epoch"] == alone["selection"]["epoch"]


def test_streamed_and_held_give_the_same_weights(few, baseline: Path, tmp_path: Path) -> None:
    """The weights would depend on how much memory happened to be free."""
    held = fine_tune(few, baseline, quick(flip=True), tmp_path / "held")
    streamed = fine_tune(few, baseline, quick(flip=True, memory_share=0), tmp_path / "streamed")
    assert held["selection"]["epoch"] == 1 and held["sha256"] == streamed["sha256"]


def test_mirroring_is_as_the_baseline_decided(few, baseline: Path, tmp_path: Path) -> None:
    """Digits that the first step found not to survive a mirror would be mirrored by the second."""
    assert read_info(baseline)["augmentation"]["flip"] is False
    auto, no, yes = (fine_tune(few, baseline, quick(flip=f), tmp_path / f) for f in ("auto", "no", "yes"))
    assert auto["sha256"] == no["sha256"] != yes["sha256"]
    assert auto["hyperparameters"]["flip"] == "no" and yes["augmentation"]["flip"] is True


def test_no_validation_split_is_no_error(dataset, baseline: Path, tmp_path: Path) -> None:
    """Three images a class may leave none to validate on."""
    alone = dataset._replace(manifest=dataset.split("train").take(list(range(0, 240, 6))))
    info = fine_tune(alone, baseline, quick(epochs=2, metric="accuracy"), tmp_path / "model")
    assert info["selection"]["examples"] == 0


def test_one_example_left_over_is_no_batch_for_batchnorm(dataset, baseline: Path, tmp_path: Path) -> None:
    """33 images in batches of 16 would end with an error of torch's about one value per channel."""
    import pyarrow as pa

    odd = dataset._replace(
        manifest=pa.concat_tables([dataset.split("train").take(list(range(0, 231, 7))), dataset.split("val")])
    )
    for more in ({"batchnorm": "trained"}, {"mixup": 0.5}, {"micro_batch": 4}):
        info = fine_tune(odd, baseline, quick(**more), tmp_path / "model")
        assert np.isfinite(info["history"][1]["train_loss"])


def test_divergence_is_said_and_leaves_the_best(few, baseline: Path, tmp_path: Path) -> None:
    """A loss that is no number any more would be saved as a model."""
    said: list[str] = []
    chosen = quick(optimizer="sgd", learning_rate=1e30, clip_norm=0, epochs=3, warmup=0)
    info = fine_tune(few, baseline, chosen, tmp_path / "model", note=said.append)
    assert any("diverged in epoch 1" in line and "learning_rate" in line for line in said)
    assert info["selection"]["epoch"] == 0
    assert all(np.isfinite(v).all() for v in load_file(tmp_path / "model" / "model.safetensors").values())


def test_a_range_test_finds_the_rate_and_leaves_the_network(few, baseline: Path, tmp_path: Path) -> None:
    """Steps taken to find a rate, at rates that are far too large, would be the start of training."""
    said: list[str] = []
    chosen = quick(rate_test=True, learning_rate=0)
    info = fine_tune(few, baseline, chosen, tmp_path / "model", note=said.append)
    assert any("by a range test of" in line for line in said)
    assert info["history"][0]["val_loss"] == pytest.approx(np.log(10), abs=1e-5), "the head is still of zeros"
    assert 1e-7 <= info["hyperparameters"]["learning_rate"] <= 0.1


def test_several_seeds_keep_the_best_and_tell_the_spread(few, baseline, tmp_path, monkeypatch) -> None:
    """On few labels a seed is worth points: who sees one figure alone takes luck for skill."""
    monkeypatch.setenv("GRAFTWORK_CHECKPOINTS", str(tmp_path / "checkpoints"))
    settings = FineTuneSettings(epochs=2, batch_size=16, seeds=3, seed=5, plan_seconds=0)
    said: list[str] = []
    curves: list[str] = []
    done = fine_tune(
        few, baseline, settings, tmp_path / "all", note=said.append, on_epoch=lambda epoch, m: curves.extend(m)
    )
    alone = [
        fine_tune(few, baseline, settings.model_copy(update={"seed": n, "seeds": 1}), tmp_path / str(n))
        for n in (5, 6, 7)
    ]
    best = max(
        alone, key=lambda info: (info["selection"]["val"]["val_accuracy"], -info["selection"]["val"]["val_loss"])
    )
    assert done["sha256"] == best["sha256"] == read_info(tmp_path / "all")["sha256"]
    assert [one["seed"] for one in done["seeds"]] == [5, 6, 7]
    assert [one["val_loss"] for one in done["seeds"]] == [one["selection"]["val"]["val_loss"] for one in alone]
    assert done["training_seconds"] == pytest.approx(sum(one["seconds"] for one in done["seeds"]))
    assert "val_accuracy" in curves and "seed_6/val_accuracy" in curves
    assert "standard deviation" in said[-1] and not list((tmp_path / "checkpoints").glob("*/seed-*"))


def test_a_seed_that_is_done_is_not_trained_again(few, baseline, tmp_path, monkeypatch) -> None:
    """Five seeds are hours: a node that goes in the fourth must cost no more than a part of that one."""
    monkeypatch.setenv("GRAFTWORK_CHECKPOINTS", str(tmp_path / "checkpoints"))
    settings = FineTuneSettings(epochs=1, batch_size=16, seeds=2, plan_seconds=0)
    trained: list[int] = []
    train = finetune.train

    def stops_in_the_second(dataset, baseline, info, own, *rest):
        trained.append(own.seed)
        if trained.count(1) == 1 and own.seed == 1:
            raise KeyboardInterrupt
        return train(dataset, baseline, info, own, *rest)

    monkeypatch.setattr(finetune, "train", stops_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(few, baseline, settings, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    fine_tune(few, baseline, settings, tmp_path / "model")
    assert trained == [0, 1, 1]
