"""Convolutions with other gradient kernels: the same numbers, or her fine-tuned model is another one."""

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from graftwork.convolutions import Depthwise, Pointwise, faster_gradients


def gradients(layer: nn.Module, x: Tensor, upstream: Tensor) -> list[Tensor]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(upstream)
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (3, 2), (4, 4), (7, 5)])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 5, "padding": 2}, {"kernel_size": 3, "padding": 1}, {"kernel_size": 7, "padding": 3, "stride": 2},
        {"kernel_size": (3, 5), "padding": (1, 2)}, {"kernel_size": 5, "padding": 4, "stride": (2, 1), "bias": False},
    ],
)  # fmt: skip
def test_depthwise_gradients_are_pytorchs(
    options: dict, size: tuple[int, int], memory_format: torch.memory_format
) -> None:
    """A wrong sum at the border of a small map would train her network on noise, and no error would say so."""
    torch.manual_seed(0)
    usual = nn.Conv2d(6, 6, groups=6, **options)
    ours = faster_gradients(copy.deepcopy(usual))
    assert type(ours) is Depthwise
    x = torch.randn(4, 6, *size).to(memory_format=memory_format)
    upstream = torch.randn_like(usual(x))
    for found, expected in zip(gradients(ours, x, upstream), gradients(usual, x, upstream), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("bias", [True, False])
def test_pointwise_gradients_are_pytorchs(bias: bool, memory_format: torch.memory_format) -> None:
    """As above, for the layers that hold most of the weights; the next layer must find channels last as well."""
    torch.manual_seed(0)
    usual = nn.Conv2d(6, 10, 1, bias=bias)
    ours = faster_gradients(copy.deepcopy(usual))
    assert type(ours) is Pointwise
    x = torch.randn(4, 6, 5, 3).to(memory_format=memory_format)
    assert ours(x).is_contiguous(memory_format=memory_format)
    upstream = torch.randn_like(usual(x))
    for found, expected in zip(gradients(ours, x, upstream), gradients(usual, x, upstream), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_is_something_else_stays_it() -> None:
    """A convolution with stride, groups, dilation or another padding, taken for one of these, would compute something else."""
    others = [
        nn.Conv2d(4, 4, 1, stride=2), nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 1, padding=1), nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, groups=4, dilation=2), nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(4, 4, 3, groups=4, padding="same"),
        nn.Conv2d(4, 4, 3, groups=4, padding=1, padding_mode="reflect"),
    ]  # fmt: skip
    assert all(type(faster_gradients(other)) is nn.Conv2d for other in others)
    timms = timm.create_model("tf_efficientnet_lite0").conv_stem
    assert type(faster_gradients(timms)) is type(timms) is not nn.Conv2d


def test_a_network_keeps_its_weights_and_outputs() -> None:
    """A model that was trained so must load, and predict the same, wherever it is used."""
    torch.manual_seed(0)
    usual = timm.create_model("mobilenetv3_small_050", num_classes=3).eval()
    ours = faster_gradients(copy.deepcopy(usual))
    assert {type(m) for m in ours.modules()} >= {Depthwise, Pointwise}
    assert list(ours.state_dict()) == list(usual.state_dict())
    x = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        assert torch.equal(ours(x), usual(x)), "in inference, they are what they were"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours(x), usual(x)), "and in other precisions"
    wanted = torch.tensor([0, 1])
    for network in (ours, usual):
        nn.functional.cross_entropy(network(x), wanted).backward()
    for (name, found), expected in zip(ours.named_parameters(), usual.parameters(), strict=True):
        assert found.grad is not None and expected.grad is not None, name
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-2, atol=1e-5, msg=name)
