"""Rules of thumb: what to train, how long and how fast, from the labels and the backbone. Each is a plain function with its source."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import timm.models
from torch import nn

from graftwork.errors import UserError
from graftwork.settings import FineTuneSettings

RATES = {  # of the head, by optimizer: pretrained with BatchNorm, pretrained without (transformers and their kin), from scratch
    "adamw": (1e-3, 2e-4, 2e-3),
    "sgd": (1e-2, 3e-3, 5e-2),
    "schedule-free": (1e-3, 2e-4, 2e-3),
}


class Plan(NamedTuple):
    """What a run will do, with the reason for each choice that the user left open."""

    strategy: str  # "head", "last-blocks", "gradual", "full" or "scratch"
    epochs: int
    batch_size: int
    learning_rate: float  # of the head; the layers below it get less, by layer decay
    layer_decay: float
    reasons: list[str]
    frozen_statistics: bool = True  # of BatchNorm
    mixup: float = 0.0
    balance: str = "none"  # "none", "sampling" or "weights"


class Recipe(NamedTuple):
    """The rules that differ from one kind of network to another."""

    strategy: Callable[[int, int], str]  # of examples and classes
    epochs: Callable[[int, int], int]  # of examples and batch size
    batch_size: Callable[[int], int]  # of examples
    rate: Callable[[str, str, bool], float]  # of optimizer, strategy and whether there is BatchNorm
    layer_decay: Callable[[str, bool], float]  # of strategy and whether there is BatchNorm
    patient_steps: int  # without a better epoch, at least, before training stops, however short the epochs are
    ema_steps: int  # of training, from which on an average of the weights over the steps pays
    # Whether the weights half way back to the pretrained ones are kept unless validation speaks against it (WiSE-FT: Wortsman et al. 2022),
    # the head then learns from validation what the baseline's did, and the baseline is kept where validation does not clearly prefer another.
    # On chatterbot-topics with 8 and 16 a class, the tuned weights alone lay between 3.9 points below the baseline and 1.2 above it.
    grafts: bool
    mixes: bool  # whether the mean of two inputs is an input, as mixup and CutMix need


def plan(
    settings: FineTuneSettings,
    examples: int,
    classes: int,
    batchnorm: bool = True,
    imbalance: float = 1.0,
    recipe: "Recipe | None" = None,
) -> Plan:
    """Fill in what ``settings`` leaves open, by ``recipe`` (that of images, if none is given).

    ``batchnorm`` says whether the backbone has BatchNorm; ``imbalance`` is the largest class's examples over the smallest's.

    Raises:
        UserError: a setting asks for what such examples do not allow.
    """
    reasons = []
    rules = recipe or IMAGE
    strategy: str = settings.strategy
    if strategy == "auto":
        strategy = rules.strategy(examples, classes)
        reasons.append(f"strategy {strategy}: {examples} labels for {classes} classes")
    batch_size = min(settings.batch_size or rules.batch_size(examples), examples)
    epochs = settings.epochs
    if not epochs:
        epochs = rules.epochs(examples, batch_size)
        reasons.append(f"epochs {epochs}: for {examples} labels")
    if not settings.batch_size:
        reasons.append(f"batch size {batch_size}: {-(-examples // batch_size)} steps an epoch")
    rate = settings.learning_rate or rules.rate(settings.optimizer, strategy, batchnorm)
    if not settings.learning_rate:
        kind = "" if batchnorm or strategy == "scratch" else ", and a backbone without BatchNorm"
        reasons.append(f"learning rate {rate:g}: for {settings.optimizer} and strategy {strategy}{kind}")
    decay = settings.layer_decay or rules.layer_decay(strategy, batchnorm)
    if not settings.layer_decay and decay != 1.0:
        reasons.append(f"layer decay {decay:g}: for {'a convolutional' if batchnorm else 'an attention-like'} backbone")
    frozen = settings.batchnorm == "frozen" or (settings.batchnorm == "auto" and strategy != "scratch")
    if settings.batchnorm == "auto" and batchnorm:
        reasons.append(f"BatchNorm's statistics {'frozen: those of small batches are noise' if frozen else 'trained'}")
    if not rules.mixes and (settings.mixup > 0 or settings.cutmix > 0):
        name = "mixup" if settings.mixup > 0 else "cutmix"
        raise UserError(f"setting {name} = {getattr(settings, name):g}: such examples cannot be mixed; leave it out")
    mixup = 0.0 if not rules.mixes else settings.mixup if settings.mixup >= 0 else choose_mixup(examples)
    if settings.mixup < 0 and mixup:
        reasons.append(f"mixup {mixup:g}: {examples} labels")
    balance: str = settings.balance
    if balance == "auto":
        balance = choose_balance(settings.metric, imbalance)
        if balance != "none":
            reasons.append(
                f"balanced sampling: the largest class is {imbalance:.0f} times the smallest, {settings.metric} weighs them alike"
            )
    return Plan(strategy, epochs, batch_size, rate, decay, reasons, frozen, mixup, balance)


def choose_strategy(examples: int, classes: int) -> str:
    """The head alone for the fewest labels, the upper layers for up to 10,000, all layers for more.

    Fine-tuning beats frozen features on most datasets and least on the smallest (Kornblith et al. 2019, "Do better ImageNet models
    transfer better?"). The lowest layers are the most general (Yosinski et al. 2014, "How transferable are features in deep neural
    networks?") and, where images are largest, the dearest: measured on Fashion-MNIST with 1,000 labels, leaving the lowest 40 % alone
    takes two thirds of the time (53 s against 79 s). In accuracy, one seed could not tell them apart: 0.872 against 0.864 on 2,000 test
    images, 0.860 against 0.884 on 250 validation images.
    """
    return "head" if examples < 5 * classes else "last-blocks" if examples <= 10_000 else "full"


def choose_epochs(examples: int) -> int:
    """About 8,000 images seen: many passes over a small set, few over a large one, within 3 to 20.

    What a schedule needs is a number of steps, not of epochs (Kolesnikov et al. 2020, BiT-HyperRule). Measured on Fashion-MNIST with
    1,000 labels, two draws, 3,311 images that no run had seen: 0.872 and 0.864 with six epochs, 0.870 and 0.872 with eight.
    """
    return max(3, min(20, round(8000 / max(examples, 1))))


def choose_batch_size(examples: int) -> int:
    """A power of two from 8 to 64 that leaves about 30 steps to an epoch: few labels need the steps, many the throughput."""
    return int(max(8, min(64, 2 ** round(math.log2(max(examples, 1) / 30)))))


def choose_rate(optimizer: str, strategy: str, batchnorm: bool) -> float:
    """The rate of the head: a fifth of the usual for backbones without BatchNorm, which are trained with small rates.

    AdamW at 1e-3 with layer decay, from a probe's head, measured on Fashion-MNIST; SGD 0.003 for all in BiT-HyperRule (Kolesnikov et
    al. 2020), at batches of 512; transformers are fine-tuned with AdamW at 1e-4 to 5e-4 and layer decay (Bao et al. 2022, BEiT).
    """
    pretrained, without_batchnorm, scratch = RATES[optimizer]
    return scratch if strategy == "scratch" else pretrained if batchnorm else without_batchnorm


def choose_layer_decay(strategy: str, batchnorm: bool) -> float:
    """0.9 for convolutional backbones, 0.75 for transformers and their kin; none from scratch, where no layer has anything to preserve.

    Howard and Ruder 2018 (ULMFiT, discriminative rates); Bao et al. 2022 (BEiT: 0.65 to 0.75 by the network's size).
    """
    return 1.0 if strategy == "scratch" else 0.9 if batchnorm else 0.75


def choose_mixup(examples: int) -> float:
    """0.1 from 20,000 labels on, none below: on small data it costs accuracy (Kolesnikov et al. 2020, BiT-HyperRule)."""
    return 0.1 if examples >= 20_000 else 0.0


def choose_balance(metric: str, imbalance: float) -> str:
    """Balanced sampling where the metric weighs classes alike and the largest has over three times the smallest's examples; else none.

    Balancing trades accuracy on the frequent classes for the rare ones (Kang et al. 2020, "Decoupling representation and classifier
    for long-tailed recognition"): whoever asks for accuracy is better off without.
    """
    return "sampling" if metric == "macro_f1" and imbalance > 3 else "none"


IMAGE = Recipe(
    strategy=choose_strategy,
    epochs=lambda examples, batch_size: choose_epochs(examples),
    batch_size=choose_batch_size,
    rate=choose_rate,
    layer_decay=choose_layer_decay,
    patient_steps=0,
    ema_steps=0,
    grafts=False,  # the figures of images were measured so
    mixes=True,
)


# ---- text ----------------------------------------------------------------------------------------------------------------------

TEXT_RATES = {
    "adamw": (1e-4, 5e-4),
    "sgd": (1e-2, 5e-2),
    "schedule-free": (1e-4, 5e-4),
}  # of the head: pretrained, from scratch
TEXT_STEPS = 400  # at least, while there are epochs to give


def choose_text_strategy(examples: int, classes: int) -> str:
    """The head alone for the fewest labels, else all layers: a transformer's are equally dear, and layer decay protects the lower ones."""
    return "head" if examples < 5 * classes else "full"


def choose_text_epochs(examples: int, batch_size: int) -> int:
    """As many epochs as make ``TEXT_STEPS`` steps, within 3 to 20.

    It is steps that small sets lack: 20 epochs instead of 3 lift BERT on RTE from 52.3 to 70.1 (Mosbach et al. 2021, "On the Stability
    of Fine-tuning BERT"; Zhang et al. 2021, "Revisiting Few-sample BERT Fine-tuning").
    """
    return max(3, min(20, math.ceil(TEXT_STEPS * batch_size / max(examples, 1))))


def choose_text_batch_size(examples: int) -> int:
    """A power of two from 8 to 32: 16 and 32 are BERT's own (Devlin et al. 2019), and few labels need the steps."""
    return int(max(8, min(32, 2 ** round(math.log2(max(examples, 1) / 30)))))


def choose_text_rate(optimizer: str, strategy: str, batchnorm: bool) -> float:
    """The rate of the head; with a layer decay of 0.9, BERT's twelve layers learn at 1e-4 to 3e-5, the rates of Devlin et al. 2019.

    AdamW corrects the bias of its moments, whose lack made BERT's fine-tuning unstable (Zhang et al. 2021).
    """
    pretrained, scratch = TEXT_RATES[optimizer]
    return scratch if strategy == "scratch" else pretrained


def choose_text_layer_decay(strategy: str, batchnorm: bool) -> float:
    """0.9 (Zhang et al. 2021; Howard and Ruder 2018, "Universal language model fine-tuning"); none from scratch."""
    return 1.0 if strategy == "scratch" else 0.9


TEXT = Recipe(
    strategy=choose_text_strategy,
    epochs=choose_text_epochs,
    batch_size=choose_text_batch_size,
    rate=choose_text_rate,
    layer_decay=choose_text_layer_decay,
    patient_steps=TEXT_STEPS // 2,
    ema_steps=1000,  # fewer are soon over: the average would lag behind
    grafts=True,
    mixes=False,
)


# ---- what is trained -------------------------------------------------------------------------------------------------------------


def freeze(network: Any, strategy: str, head: str, share: float = 0.4) -> None:
    """Set ``requires_grad`` as ``strategy`` says: the head alone, all but the lowest ``share`` of the layers, or all."""
    if strategy in ("full", "scratch"):
        network.requires_grad_(True)
        return
    layer = timm.models.group_parameters(network, network.group_matcher(coarse=False), reverse=True)
    depth = max(layer.values())
    for name, parameter in network.named_parameters():
        near_the_top = strategy in ("last-blocks", "gradual") and layer.get(name, depth) > share * depth
        parameter.requires_grad_(near_the_top or name.startswith(f"{head}."))


def frozen_share(epoch: int, epochs: int) -> float:
    """Return the share of the layers, from the lowest, that are frozen in ``epoch`` (from 1) of gradual unfreezing.

    The head alone in the first epoch, every layer in the last third (Howard and Ruder 2018, "Universal language model fine-tuning").
    """
    unfreezing = max(1, round(2 / 3 * epochs))
    return max(0.0, 1.0 - (epoch - 1) / unfreezing) if epoch <= unfreezing else -1.0


def has_batchnorm(network: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
