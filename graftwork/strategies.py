"""Rules of thumb: what to train, how long and how fast, from the number of labels alone. Each is a plain function with its source."""

from typing import Any, NamedTuple

import timm.models

from graftwork.settings import FineTuneSettings


class Plan(NamedTuple):
    """What a run will do, with the reason for each choice that the user left open."""

    strategy: str  # "head", "last-blocks", "full" or "scratch"
    epochs: int
    learning_rate: float  # of the head; the layers below it get less, by layer decay
    layer_decay: float
    reasons: list[str]


def plan(settings: FineTuneSettings, examples: int, classes: int) -> Plan:
    """Fill in what ``settings`` leaves open."""
    reasons = []
    strategy: str = settings.strategy
    if strategy == "auto":
        strategy = choose_strategy(examples, classes)
        reasons.append(f"strategy {strategy}: {examples} labels for {classes} classes")
    epochs = settings.epochs
    if not epochs:
        epochs = choose_epochs(examples, settings.batch_size)
        reasons.append(
            f"epochs {epochs}: about {epochs * -(-examples // settings.batch_size)} steps of {settings.batch_size}"
        )
    rate = settings.learning_rate or {"head": 1e-3, "last-blocks": 1e-3, "full": 1e-3, "scratch": 2e-3}[strategy]
    if not settings.learning_rate:
        reasons.append(f"learning rate {rate:g}: for AdamW and strategy {strategy}")
    # Random layers have nothing to preserve: all of them learn at the full rate.
    return Plan(strategy, epochs, rate, 1.0 if strategy == "scratch" else settings.layer_decay, reasons)


def choose_strategy(examples: int, classes: int) -> str:
    """All layers, unless labels are so few that only the head can be learned.

    Fine-tuning beats frozen features on most datasets and least on the smallest (Kornblith et al. 2019, "Do better ImageNet models
    transfer better?"); from the probe's head and with layer-wise rates it loses nothing in distribution (Kumar et al. 2022).
    """
    return "head" if examples < 5 * classes else "full"


def choose_epochs(examples: int, batch_size: int) -> int:
    """About 200 steps for small sets, fewer passes for large ones, within 3 to 20 epochs.

    The number of steps, not of epochs, is what a schedule needs (Kolesnikov et al. 2020, BiT-HyperRule, which takes 500 steps of
    512 for up to 20,000 examples on accelerators; measured here, from a probe's head, 190 steps of 32 are enough for 1,000 examples).
    """
    steps = -(-examples // batch_size)
    return max(3, min(20, round(190 / max(steps, 1))))


def freeze(network: Any, strategy: str, head: str) -> None:
    """Set ``requires_grad`` as ``strategy`` says: the head alone, the last quarter of the layers, or all."""
    if strategy in ("full", "scratch"):
        return
    layer = timm.models.group_parameters(network, network.group_matcher(coarse=False), reverse=True)
    depth = max(layer.values())
    for name, parameter in network.named_parameters():
        near_the_top = strategy == "last-blocks" and layer.get(name, depth) > 0.75 * depth
        parameter.requires_grad_(near_the_top or name.startswith(f"{head}."))
