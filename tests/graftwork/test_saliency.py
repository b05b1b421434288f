"""Where the network looked."""

import numpy as np
import pytest
import timm
import torch

from graftwork.batches import examples_of
from graftwork.images import Preprocess
from graftwork.model import Model, load_model
from graftwork.saliency import feature_map, overlay, saliency


def model_of(name: str, size: int, **args: object) -> Model:
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=3, **args).eval()
    preprocess = Preprocess(size=size, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    return Model(network, {"classes": ["a", "b", "c"]}, preprocess, torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "size", "args", "layer"),
    [
        ("test_resnet", 160, {}, "layer4"),
        ("test_resnet", 64, {}, "layer3"),  # the last map would have two cells a side
        ("tf_efficientnet_lite0", 96, {}, "blocks.4"),
        ("test_convnext", 64, {}, "stages.2"),
        ("test_vit", 64, {"img_size": 64}, None),
        ("swin_tiny_patch4_window7_224", 224, {}, None),  # maps, but with the channels last
    ],
)
def test_every_kind_of_network_has_a_map(name: str, size: int, args: dict, layer: str | None) -> None:
    """A backbone for which the report's pictures fail, or are of channels instead of places."""
    model = model_of(name, size, **args)
    pixels = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    found = feature_map(model, pixels[:1])
    assert found is (None if layer is None else model.network.get_submodule(layer))
    if size == 224:
        return  # seconds
    state = torch.random.get_rng_state()
    heat = saliency(model, pixels, np.array([0, 2]))
    assert heat.shape == (2, size, size) and heat.dtype == np.float32
    assert heat.min() >= 0 and set(heat.max((1, 2)).round(5)) <= {0.0, 1.0}
    np.testing.assert_array_equal(heat, saliency(model, pixels, np.array([0, 2])))
    assert torch.equal(state, torch.random.get_rng_state()), "training after it would draw other numbers"
    assert all(p.grad is None for p in model.network.parameters())
    assert not any(m._forward_hooks for m in model.network.modules()), "prediction would go on calling them"


class Colours(torch.nn.Module):
    """A network that answers "red" or "blue" by the mean of what its one layer finds in each place."""

    num_features = 2

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 2, 8, 8, bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(
                torch.tensor([[1.0, -0.5, -0.5], [-0.5, -0.5, 1.0]])[:, :, None, None].expand(2, 3, 8, 8)
            )

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_features(x).relu().mean((2, 3))


@pytest.mark.parametrize("way", ["map", "gradients"])
def test_the_heat_lies_where_the_class_is(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture that points at the wrong place is worse than none. Each image has a red and a blue patch: asked for one, not the other."""
    if way == "gradients":
        monkeypatch.setattr("graftwork.saliency.CELLS", 99)
    preprocess = Preprocess(size=64, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    model = Model(Colours().eval(), {"classes": ["red", "blue"]}, preprocess, torch.device("cpu"))
    pixels = np.random.default_rng(0).integers(100, 156, (20, 64, 64, 3)).astype(np.uint8)
    pixels[:, 4:28, 4:28] = (255, 0, 0)
    pixels[:, 36:60, 4:28] = (0, 0, 255)
    for asked, place in ((0, np.s_[:, :32, :32]), (1, np.s_[:, 32:, :32])):
        heat = saliency(model, pixels, np.full(20, asked))
        assert heat[place].sum() / heat.sum() > 0.9


def test_the_pictures_of_a_trained_model(dataset, tuned) -> None:
    """The step that shows the mistakes must take a Model artifact as it is, and no mistakes at all."""
    model = load_model(tuned, "cpu")
    pixels = np.stack(list(examples_of(dataset, dataset.split("test").slice(0, 5), model.preprocess)))
    heat = saliency(model, pixels, np.arange(5))
    picture = overlay(pixels[0], heat[0])
    assert picture.size == (model.preprocess.size,) * 2 and picture.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(overlay(pixels[0], np.zeros_like(heat[0]))), pixels[0])
    hot = np.asarray(overlay(np.full((4, 4, 3), 128, np.uint8), np.eye(4, dtype=np.float32)))
    assert (hot[0, 1] == 128).all() and (hot[0, 0] != 128).any()
    assert saliency(model, pixels[:0], np.zeros(0, np.int64)).shape == (0, *heat.shape[1:])
