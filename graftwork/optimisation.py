"""Optimisation: optimizers, schedules, mixing, balance of classes, and the rate-range test, each a plain function.

Schedules are functions of how much of the training is done, and of the history: they have no state of their own, so a run that goes
on after a crash has nothing of theirs to restore.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor

from graftwork.settings import FineTuneSettings
from graftwork.strategies import Plan

BEST_OF_RANGE = 0.1  # the rate to take, as a share of the one at which the loss was smallest


def make_optimizer(network: Any, plan: Plan, settings: FineTuneSettings, steps: int, fused: bool = True) -> Any:
    """Return the optimizer over the parameters that require a gradient, with layer-wise rates; each group keeps its peak as ``peak_lr``."""
    groups = param_groups_layer_decay(network, weight_decay=settings.weight_decay, layer_decay=plan.layer_decay)
    for group in groups:
        group["peak_lr"] = group["lr"] = plan.learning_rate * group.get("lr_scale", 1.0)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True, fused=fused)
    if settings.optimizer == "schedule-free":
        from schedulefree import AdamWScheduleFree

        # Defazio et al. 2024, "The Road Less Scheduled": it averages its iterates itself, and takes a warm-up but no schedule.
        return AdamWScheduleFree(groups, lr=plan.learning_rate, warmup_steps=round(settings.warmup * steps))
    return torch.optim.AdamW(groups, fused=fused)


def set_rates(optimizer: Any, factor: float) -> None:
    """Set every group to ``factor`` of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def rate_factor(settings: FineTuneSettings, step: int, steps: int, history: list[dict[str, float]]) -> float:
    """Return the share of the peak rate at ``step`` of ``steps``.

    cosine: Loshchilov and Hutter 2017 (SGDR), one cycle. one-cycle: Smith and Topin 2018, the rise takes 30 %. step: a tenth at 30, 60
    and 90 % (Kolesnikov et al. 2020, BiT-HyperRule). plateau: a third after every two epochs without a better validation loss.
    """
    if settings.optimizer == "schedule-free":
        return 1.0
    warmup = 0.3 if settings.schedule == "one-cycle" else settings.warmup
    rising = round(warmup * steps)
    if step < rising:
        share = step / rising
        return (1 - math.cos(math.pi * share)) / 2 if settings.schedule == "one-cycle" else share
    done = (step - rising) / max(1, steps - rising)
    if settings.schedule in ("cosine", "one-cycle"):
        return float((1 + math.cos(math.pi * min(done, 1.0))) / 2)
    if settings.schedule == "step":
        return float(0.1 ** sum(step >= share * steps for share in (0.3, 0.6, 0.9)))
    if settings.schedule == "plateau":
        return plateau_factor([epoch["val_loss"] for epoch in history])
    return 1.0


def plateau_factor(losses: list[float], patience: int = 2, factor: float = 1 / 3) -> float:
    """Return ``factor`` to the power of how often ``patience`` epochs in a row brought no smaller loss."""
    best, waited, drops = math.inf, 0, 0
    for loss in losses:
        if loss < best:
            best, waited = loss, 0
        else:
            waited += 1
            if waited == patience:
                drops, waited = drops + 1, 0
    return factor**drops


def epoch_order(
    targets: Tensor, classes: int, balance: str, generator: torch.Generator, example_weights: Tensor | None = None
) -> Tensor:
    """Return the examples of one epoch by position: each once, or drawn.

    They are drawn where every class is to come as often as the others, or where examples have weights (N,): one of weight 2 comes twice as often.
    """
    if balance != "sampling" and example_weights is None:
        return torch.randperm(len(targets), generator=generator)
    weights = torch.ones(len(targets)) if example_weights is None else example_weights.float()
    if balance == "sampling":
        total = torch.zeros(classes).index_add_(0, targets, weights)
        weights = weights / total[targets]
    return torch.multinomial(weights, len(targets), replacement=True, generator=generator)


def class_weights(targets: Tensor, classes: int) -> Tensor:
    """Return N / (classes * count) for each class, float32 (classes,): scikit-learn's "balanced"; 0 for a class that is absent."""
    counts = torch.bincount(targets, minlength=classes)
    weights = len(targets) / (int((counts > 0).sum()) * counts.clamp_min(1).float())
    return torch.where(counts > 0, weights, torch.zeros(()))


def mixing(plan: Plan, settings: FineTuneSettings, classes: int) -> Any:
    """Return timm's Mixup (Zhang et al. 2018, and CutMix, Yun et al. 2019), other numbers for every example, or None where neither is wanted."""
    if not plan.mixup and not settings.cutmix:
        return None
    from timm.data import Mixup

    smoothing = settings.label_smoothing
    return Mixup(plan.mixup, settings.cutmix, mode="elem", label_smoothing=smoothing, num_classes=classes)


def range_test(
    step: Callable[[float], float], low: float = 1e-6, high: float = 1.0, steps: int = 60
) -> tuple[float, list[dict[str, float]]]:
    """Take one training ``step(rate) -> loss`` after the other with a rising rate; return (rate to take, the curve).

    Smith 2017, "Cyclical Learning Rates for Training Neural Networks". The rate taken is a tenth of the one at which the smoothed loss
    was smallest; the test ends where the loss is four times that.
    """
    curve: list[dict[str, float]] = []
    smooth = best = math.inf
    rate_at_best = low
    for n in range(steps):
        rate = low * (high / low) ** (n / (steps - 1))
        loss = step(rate)
        if not math.isfinite(loss):
            break
        smooth = loss if math.isinf(smooth) else 0.7 * smooth + 0.3 * loss
        curve.append({"rate": rate, "loss": smooth})
        if smooth < best:
            best, rate_at_best = smooth, rate
        if smooth > 4 * best:
            break
    return BEST_OF_RANGE * rate_at_best, curve
