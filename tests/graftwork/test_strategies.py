"""The rules that decide where the user does not: each boundary, and the reason that is printed."""

from itertools import pairwise

import pytest
import timm
from conftest import TINY

from graftwork import strategies
from graftwork.settings import FineTuneSettings
from graftwork.strategies import Plan, freeze, frozen_share, has_batchnorm, plan


@pytest.mark.parametrize(
    ("rule", "arguments", "wanted"),
    [
        ("strategy", (49, 10), "head"), ("strategy", (50, 10), "last-blocks"), ("strategy", (10_000, 10), "last-blocks"),
        ("strategy", (10_001, 10), "full"), ("strategy", (4999, 1000), "head"), ("strategy", (5000, 1000), "last-blocks"),
        ("epochs", (1, ), 20), ("epochs", (50,), 20), ("epochs", (300,), 20), ("epochs", (1000,), 8), ("epochs", (2000,), 4),
        ("epochs", (1_000_000,), 3), ("epochs", (0,), 20),
        ("batch_size", (0,), 8), ("batch_size", (20,), 8), ("batch_size", (500,), 16), ("batch_size", (1000,), 32),
        ("batch_size", (50_000,), 64),
        ("rate", ("adamw", "full", True), 1e-3), ("rate", ("adamw", "head", False), 2e-4), ("rate", ("adamw", "scratch", False), 2e-3),
        ("rate", ("sgd", "last-blocks", True), 1e-2), ("rate", ("sgd", "full", False), 3e-3), ("rate", ("sgd", "scratch", True), 5e-2),
        ("rate", ("schedule-free", "full", True), 1e-3),
        ("layer_decay", ("full", True), 0.9), ("layer_decay", ("full", False), 0.75), ("layer_decay", ("scratch", False), 1.0),
        ("mixup", (19_999,), 0.0), ("mixup", (20_000,), 0.1),
        ("balance", ("macro_f1", 3.0), "none"), ("balance", ("macro_f1", 3.1), "sampling"), ("balance", ("accuracy", 100.0), "none"),
        ("balance", ("loss", 100.0), "none"),
    ],
)  # fmt: skip
def test_rule(rule: str, arguments: tuple, wanted: object) -> None:
    """With no knob touched, the rules decide whether she gets a good model: they must stay where they were measured."""
    found = getattr(strategies, f"choose_{rule}")(*arguments)
    assert found == wanted and type(found) is type(wanted)


def test_every_choice_left_open_is_explained_and_no_other() -> None:
    """A choice without a reason is a riddle; a reason for what she chose herself is noise."""
    found = plan(FineTuneSettings(metric="macro_f1"), 30_000, 10, imbalance=9.0)
    assert found[:5] == ("full", 3, 64, 1e-3, 0.9)
    assert (found.frozen_statistics, found.mixup, found.balance) == (True, 0.1, "sampling")
    said = "\n".join(found.reasons)
    for words in (
        "strategy full: 30000 labels", "epochs 3", "batch size 64: 469 steps", "learning rate 0.001: for adamw", "layer decay 0.9",
        "BatchNorm's statistics frozen", "mixup 0.1", "balanced sampling: the largest class is 9 times",
    ):  # fmt: skip
        assert words in said
    assert len(found.reasons) == 8
    given = FineTuneSettings(
        strategy="head", epochs=4, batch_size=32, learning_rate=0.1, layer_decay=0.5, batchnorm="frozen", mixup=0, balance="weights",
    )  # fmt: skip
    assert plan(given, 1000, 10, imbalance=9.0) == Plan("head", 4, 32, 0.1, 0.5, [], True, 0.0, "weights")


def test_no_batch_is_larger_than_the_split() -> None:
    """A batch size that nothing can fill would be printed, and the steps be miscounted."""
    assert plan(FineTuneSettings(batch_size=64), 20, 2).batch_size == 20
    assert plan(FineTuneSettings(), 5, 2).batch_size == 5


def test_a_backbone_without_batchnorm() -> None:
    """A transformer at a convolutional network's rate would diverge."""
    found = plan(FineTuneSettings(strategy="full"), 1000, 10, batchnorm=False)
    assert (found.learning_rate, found.layer_decay) == (2e-4, 0.75)
    assert any("without BatchNorm" in reason for reason in found.reasons)
    assert not any("statistics" in reason for reason in found.reasons), "there are none"


@pytest.mark.parametrize(
    ("strategy", "setting", "frozen"),
    [("full", "auto", True), ("head", "auto", True), ("scratch", "auto", False), ("scratch", "frozen", True), ("full", "trained", False)],
)  # fmt: skip
def test_whose_statistics_are_frozen(strategy: str, setting: str, frozen: bool) -> None:
    """From random weights, frozen statistics are those of no data at all; from ImageNet's, trained ones are noise."""
    assert plan(FineTuneSettings(strategy=strategy, batchnorm=setting), 1000, 10).frozen_statistics == frozen


def trained_layers(network, strategy: str, share: float = 0.4) -> list[str]:
    freeze(network, strategy, "fc", share)
    return [name for name, p in network.named_parameters() if p.requires_grad]


@pytest.fixture(scope="module")
def network():
    return timm.create_model(TINY, num_classes=3)


def test_each_strategy_trains_what_its_name_says(network) -> None:
    """Layers trained by mistake cost time and distort features; layers left out by mistake cost accuracy."""
    everything = [name for name, _ in network.named_parameters()]
    assert trained_layers(network, "full") == trained_layers(network, "scratch") == everything
    assert trained_layers(network, "head") == ["fc.weight", "fc.bias"]
    last = trained_layers(network, "last-blocks")
    assert last == everything[-len(last) :] and 2 < len(last) < len(everything), "the upper ones, without a gap"
    assert "layer4.0.conv1.weight" in last and "conv1.0.weight" not in last
    assert trained_layers(network, "full") == everything, "what was frozen before is trained again"


def test_gradual_unfreezing_goes_down_layer_by_layer(network) -> None:
    """Unfrozen all at once, the lowest layers would be distorted by a head that has learnt nothing yet."""
    everything = [name for name, _ in network.named_parameters()]
    epochs = [set(trained_layers(network, "gradual", frozen_share(epoch, 9))) for epoch in range(1, 10)]
    assert epochs[0] == {"fc.weight", "fc.bias"}
    assert all(a <= b for a, b in pairwise(epochs)), "nothing is frozen again"
    assert epochs[0] < epochs[2] < epochs[4] < set(everything)
    assert epochs[6] == epochs[7] == epochs[8] == set(everything), "all of it, in the last third"


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 20])
def test_gradual_unfreezing_ends_with_every_layer(epochs: int) -> None:
    """Two epochs of a setting that needs three would leave the network as it was, and nobody be told."""
    shares = [frozen_share(epoch, epochs) for epoch in range(1, epochs + 1)]
    assert shares[0] == 1.0 and sorted(shares, reverse=True) == shares
    assert epochs == 1 or shares[-1] < 0


def test_batchnorm_is_found_in_timms_own_layers() -> None:
    """timm's networks have a BatchNorm with the activation inside; not found, their statistics would be overwritten."""
    assert has_batchnorm(timm.create_model("test_efficientnet")) and not has_batchnorm(timm.create_model("test_vit"))
