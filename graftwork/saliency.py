"""Where the network looked: what part of an image speaks for a class."""

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from graftwork.images import Array
from graftwork.model import Floats, Model

Ints = npt.NDArray[np.int64]
BATCH = 16
# A side, that a feature map has at least. Measured on Fashion-MNIST at 96 pixels, where the last map has three: a quarter of the image
# painted over, chosen by the map before, with six, takes 0.36 to 0.44 from the probability; by the last, 0.20 to 0.31; by chance, 0.23 to 0.26.
CELLS = 4
NOISES, NOISE = 16, 0.15  # of SmoothGrad: noisy copies of an image, and the noise as a share of the range of values
SMOOTH = 0.03  # standard deviation, as a share of the side


def saliency(model: Model, pixels: Array, classes: Ints) -> Floats:
    """Return how much each pixel speaks for the class: float32 (N, size, size) from 0 to 1, the largest of each image.

    ``pixels`` are uint8 (N, size, size, 3), fitted; ``classes`` (N,) positions in ``model.classes``. By Grad-CAM (Selvaraju et al. 2017,
    https://arxiv.org/abs/1610.02391) on the last feature map of four cells a side or more. Where a network has none, as a transformer: by input times
    gradient, the mean of noisy copies as in SmoothGrad (Smilkov et al. 2017, https://arxiv.org/abs/1706.03825), which found more of what
    decides than the gradient alone (painted over, 0.36 to 0.54 of the probability against 0.28 to 0.31). An image of which nothing speaks for the class is 0.
    """
    import torch

    found = [np.zeros((0, *pixels.shape[1:3]), np.float32)]
    if not len(pixels):
        return found[0]
    preprocess: Any = model.preprocess
    layer = feature_map(model, pixels[:1])
    for start in range(0, len(pixels), BATCH):
        some = torch.from_numpy(np.ascontiguousarray(pixels[start : start + BATCH]))
        x = preprocess.to_input(some, model.device)
        target = torch.from_numpy(np.asarray(classes[start : start + BATCH], np.int64)).to(model.device)
        found.append(
            by_map(model.network, layer, x, target)
            if layer is not None
            else by_gradients(model.network, x, target, 1 / float(np.mean(preprocess.std)))
        )
    heat = np.concatenate(found)
    return heat / np.maximum(heat.max((1, 2), keepdims=True), 1e-12)


def feature_map(model: Model, pixels: Array) -> Any:
    """Return the deepest module that gives a map of channels with at least ``CELLS`` a side, or None.

    It is the last module of ``forward_features`` or a stage before it, as timm lists them.
    """
    import torch

    called: list[tuple[Any, torch.Size]] = []

    def note(module: Any, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            called.append((module, output.shape))

    network = model.network
    listed = getattr(network, "feature_info", None) or []
    stages = [(stage.get("module", ""), stage.get("num_chs")) for stage in getattr(listed, "info", listed)]
    names = dict(network.named_modules())
    hooks = [module.register_forward_hook(note) for name, module in names.items() if name]
    try:
        with torch.no_grad():
            whole = network.forward_features(model.preprocess.to_input(torch.from_numpy(pixels), model.device))
    finally:
        for hook in hooks:
            hook.remove()
    shapes = dict(called)
    # An outer module is called before, and returns after, those in it: of several with this output, the last is the outermost.
    last = next((module for module, shape in reversed(called) if shape == getattr(whole, "shape", None)), None)
    candidates = [(last, network.num_features), *((names.get(name), channels) for name, channels in reversed(stages))]
    for module, channels in candidates:
        shape = shapes.get(module, ())
        # Some transformers have maps with the channels last; tokens have no places at all.
        if len(shape) == 4 and shape[1] == channels and min(shape[2:]) >= CELLS:
            return module
    return None


def by_map(network: Any, layer: Any, x: Any, target: Any) -> Floats:
    from captum.attr import LayerAttribution, LayerGradCam

    found = LayerGradCam(network, layer).attribute(x, target=target, relu_attributions=True)
    scaled = LayerAttribution.interpolate(found, tuple(x.shape[2:]), "bilinear")
    return scaled[:, 0].detach().float().cpu().numpy()


def by_gradients(network: Any, x: Any, target: Any, spread: float) -> Floats:
    import torch
    from captum.attr import InputXGradient, NoiseTunnel
    from scipy.ndimage import gaussian_filter

    with torch.random.fork_rng():  # captum draws from the process's generators, which stay as they are
        torch.manual_seed(0)
        found = NoiseTunnel(InputXGradient(network)).attribute(
            x.requires_grad_(), target=target, nt_samples=NOISES, nt_samples_batch_size=1, stdevs=NOISE * spread
        )
    grey = found.detach().float().sum(1).cpu().numpy()
    smooth = np.stack([gaussian_filter(one, SMOOTH * one.shape[0]) for one in grey]).astype(np.float32)
    # What speaks against the class is left out, as in Grad-CAM; single bright pixels would hide all others.
    speaks = np.maximum(smooth, 0)
    return np.minimum(speaks, np.quantile(speaks, 0.99, axis=(1, 2), keepdims=True)).astype(np.float32)


def overlay(pixels: Array, heat: Floats) -> Image.Image:
    """Lay ``heat`` (size, size), 0..1, over ``pixels`` (size, size, 3), uint8: the hotter, the more colour, from blue to red."""
    from matplotlib import colormaps

    colour = colormaps["turbo"](heat)[..., :3] * 255
    share = 0.65 * np.sqrt(heat)[..., None]
    return Image.fromarray((pixels * (1 - share) + colour * share).round().astype(np.uint8))
