"""Optimisation: schedules, balance of classes, mixing, and the range test, each by what it does to numbers that can be checked."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import timm
import torch
from conftest import TINY
from sklearn.utils.class_weight import compute_class_weight

from graftwork.finetune import fine_tune
from graftwork.optimisation import (
    class_weights,
    epoch_order,
    make_optimizer,
    mixing,
    plateau_factor,
    range_test,
    rate_factor,
    set_rates,
)
from graftwork.settings import FineTuneSettings
from graftwork.strategies import plan

STEPS = 100


def curve(schedule: str, losses: tuple[float, ...] = (), **given) -> list[float]:
    history = [{"val_loss": loss} for loss in losses]
    settings = FineTuneSettings(schedule=schedule, **given)
    return [rate_factor(settings, step, STEPS, history) for step in range(STEPS)]


@pytest.mark.parametrize("schedule", ["cosine", "step", "plateau", "constant"])
def test_warm_up_rises_from_nothing_to_the_peak(schedule: str) -> None:
    """Full-sized first steps, from a head that fits nothing yet, destroy what was learnt on ImageNet."""
    rates = curve(schedule, warmup=0.1)
    assert rates[0] == 0 and all(a < b for a, b in pairwise(rates[:11])) and rates[10] == 1.0
    assert curve(schedule, warmup=0.0)[0] == 1.0
    assert max(rates) == 1.0


def test_cosine_falls_to_almost_nothing() -> None:
    """A rate that does not fall leaves the weights jumping about the minimum."""
    rates = curve("cosine", warmup=0.1)
    assert all(a > b for a, b in pairwise(rates[10:])) and rates[-1] < 0.001
    assert rates[55] == pytest.approx(0.5)


def test_one_cycle_peaks_at_three_tenths() -> None:
    """Another shape under this name is not what Smith and Topin measured."""
    rates = curve("one-cycle", warmup=0.0)
    assert rates.index(max(rates)) == 30 and rates[30] == 1.0 and rates[0] == 0 and rates[-1] < 0.001
    assert rates[15] == pytest.approx(0.5) and rates[65] == pytest.approx(0.5)


def test_step_takes_a_tenth_three_times() -> None:
    """Drops at other places than BiT's are another recipe."""
    rates = curve("step", warmup=0.1)
    assert [rates[n] for n in (29, 30, 59, 60, 89, 90, 99)] == pytest.approx([1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_plateau_follows_the_history() -> None:
    """A rate that falls while the loss still does ends training too soon."""
    assert set(curve("plateau", (1.0, 0.9, 0.8, 0.7), warmup=0.0)) == {1.0}
    assert curve("plateau", (1.0, 0.9, 0.95, 0.92), warmup=0.0)[50] == pytest.approx(1 / 3)
    assert plateau_factor([]) == 1.0
    assert plateau_factor([1, 1]) == 1.0
    assert plateau_factor([1, 1, 1]) == pytest.approx(1 / 3)
    assert plateau_factor([1, 2, 0.5, 2, 2]) == pytest.approx(1 / 3), "a better epoch starts the count anew"
    assert plateau_factor([1, 2, 2, 2, 2]) == pytest.approx(1 / 9)


def test_constant_and_schedule_free_have_no_schedule() -> None:
    """Schedule-free with a schedule is neither."""
    assert set(curve("constant", warmup=0.0)) == {1.0}
    assert set(curve("cosine", optimizer="schedule-free", warmup=0.1)) == {1.0}, "its warm-up is the optimizer's own"


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("schedule", ["cosine", "one-cycle", "step", "plateau", "constant"])
def test_a_run_of_few_steps_has_a_rate(schedule: str, warmup: float) -> None:
    """One epoch over a handful of images would be trained at a rate of nothing, or divide by zero."""
    settings = FineTuneSettings(schedule=schedule, warmup=warmup)
    for steps in (1, 2, 3):
        rates = [rate_factor(settings, step, steps, [{"val_loss": 1.0}]) for step in range(steps)]
        assert all(0 <= rate <= 1 and math.isfinite(rate) for rate in rates)
    assert max(rates) > 0


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "schedule-free"])
def test_layers_below_the_head_get_less(optimizer: str) -> None:
    """The same rate for all layers overwrites the most general ones."""
    settings = FineTuneSettings(
        optimizer=optimizer, learning_rate=0.1, layer_decay=0.5, weight_decay=0.3, strategy="full"
    )
    network = timm.create_model(TINY, num_classes=3)
    made = make_optimizer(network, plan(settings, 1000, 3), settings, 100)
    rate = {id(p): group["lr"] for group in made.param_groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in made.param_groups for p in group["params"]}
    assert len(rate) == len(list(network.parameters()))
    assert rate[id(network.fc.weight)] == pytest.approx(0.1)
    assert rate[id(network.conv1[0].weight)] < rate[id(network.layer4[0].conv1.weight)] < 0.1
    assert decay[id(network.fc.weight)] == 0.3 and decay[id(network.fc.bias)] == decay[id(network.bn1.weight)] == 0
    set_rates(made, 0.5)
    set_rates(made, 0.25)
    assert {id(p): group["lr"] for group in made.param_groups for p in group["params"]} == {
        k: pytest.approx(v / 4) for k, v in rate.items()
    }, "of the peak, not of what it was set to before"


def test_class_weights_are_scikit_learns() -> None:
    """Other weights than "balanced" are known as would be no balance."""
    targets = torch.tensor([0] * 70 + [1] * 20 + [3] * 10)
    found = class_weights(targets, 4)
    expected = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=targets.numpy())
    np.testing.assert_allclose(found[[0, 1, 3]], expected, rtol=1e-6)
    assert found[2] == 0 and found.dtype == torch.float32
    assert float(found[targets].sum()) == pytest.approx(len(targets)), "the rate keeps its meaning"


def test_balanced_sampling_draws_classes_alike() -> None:
    """With one rare class in a hundred, the network would learn to say no."""
    targets = torch.tensor([0] * 900 + [1] * 90 + [3] * 10)
    drawn = epoch_order(targets, 4, "sampling", torch.Generator().manual_seed(0))
    counts = Counter(targets[drawn].tolist())
    assert len(drawn) == len(targets) and set(counts) == {0, 1, 3}
    assert all(280 < n < 390 for n in counts.values())
    usual = epoch_order(targets, 4, "none", torch.Generator().manual_seed(0))
    assert sorted(usual.tolist()) == list(range(1000)) and usual.tolist() != sorted(usual.tolist()), (
        "each once, shuffled"
    )


def test_every_example_is_mixed_by_its_own_number() -> None:
    """One number for a whole batch is a far weaker regulariser; targets that do not follow the pixels are noise."""
    settings = FineTuneSettings(mixup=1.0, label_smoothing=0.0)
    mix = mixing(plan(settings, 1000, 4), settings, 4)
    np.random.seed(0)
    targets = torch.arange(64) % 4
    x = torch.nn.functional.one_hot(targets, 4).float()[:, :, None, None].expand(64, 4, 8, 8).contiguous()
    mixed, soft = mix(x.clone(), targets)
    assert len({round(float(v), 4) for v in soft.max(1).values}) > 20
    torch.testing.assert_close(mixed[:, :, 0, 0], soft, atol=1e-5, rtol=0)
    assert mixing(plan(FineTuneSettings(), 1000, 4), FineTuneSettings(), 4) is None
    cut = FineTuneSettings(cutmix=1.0)
    assert mixing(plan(cut, 1000, 4), cut, 4) is not None


def test_the_range_test_finds_a_rate_that_works() -> None:
    """A rate a hundred times too large or too small, found by a test that she trusted, wastes the whole run."""
    weight, noise = [5.0], np.random.default_rng(0)

    def step(rate: float) -> float:
        loss = 0.5 * weight[0] ** 2 + abs(noise.normal(0, 0.01))
        weight[0] -= rate * (weight[0] + noise.normal(0, 0.01))  # a curvature of 1: stable below 2
        return loss

    rate, found = range_test(step, low=1e-4, high=100.0)
    assert 0.01 < rate < 2
    assert len(found) < 60 and found[-1]["rate"] < 100, "it ends where the loss explodes"
    assert all(a["rate"] < b["rate"] for a, b in pairwise(found))


def test_the_range_test_survives_what_is_no_number() -> None:
    """A loss that overflows is what the test looks for, not an error."""
    rate, found = range_test(lambda rate: 1.0 / (1 + rate) if rate < 0.01 else math.nan)
    assert 1e-4 < rate < 1e-2 and found[-1]["rate"] < 0.01


@pytest.mark.parametrize("schedule", ["cosine", "one-cycle", "step", "plateau", "constant"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "schedule-free"])
def test_every_optimizer_with_every_schedule_learns(optimizer: str, schedule: str, few, baseline, tmp_path) -> None:
    """A combination that the settings allow and that fails, or does nothing, would be found after an hour."""
    settings = FineTuneSettings(
        optimizer=optimizer, schedule=schedule, epochs=2, batch_size=8, strategy="scratch", metric="loss", flip=False, shift=0,
        ema_decay=0, plan_seconds=0, checkpoint_seconds=0,
    )  # fmt: skip
    info = fine_tune(few, baseline, settings, tmp_path / "model")
    first, second = (h["train_loss"] for h in info["history"][1:])
    assert second < 0.96 * first
    assert info["hyperparameters"]["schedule"] == schedule and info["hyperparameters"]["optimizer"] == optimizer


def test_an_example_of_twice_the_weight_comes_twice_as_often() -> None:
    """A user's weight column would change nothing, or what balances the classes undo it."""
    targets = torch.tensor([0] * 300 + [1] * 100)
    weights = torch.tensor(([1.0] * 150 + [3.0] * 150) + [2.0] * 100)
    for balance, share in (("none", (300 * 2 - 150) / 800), ("sampling", 0.5 * 0.75)):
        drawn = torch.cat(
            [epoch_order(targets, 2, balance, torch.Generator().manual_seed(n), weights) for n in range(40)]
        )
        assert float(((drawn >= 150) & (drawn < 300)).float().mean()) == pytest.approx(share, abs=0.02)
