"""The Model artifact: what is written is what is read, or it is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from graftwork.errors import UserError
from graftwork.images import Preprocess
from graftwork.model import load_model, predict, read_info, save_model


def copy(model: Path, to: Path) -> Path:
    shutil.copytree(model, to)
    return to


def test_folder_holds_nothing_that_unpickles(tuned: Path) -> None:
    """A model from a colleague must be safe to open."""
    assert sorted(p.name for p in tuned.iterdir()) == ["model.json", "model.safetensors"]


def test_info_says_what_is_needed_to_use_it(tuned: Path) -> None:
    """Without preprocessing, classes, versions and digests in the artifact, it cannot be served or traced."""
    info = read_info(tuned)
    for key in (
        "backbone",
        "classes",
        "preprocess",
        "weights",
        "dataset_digest",
        "sha256",
        "seconds",
        "selection",
        "hyperparameters",
    ):
        assert info[key], key
    assert {"torch", "timm", "pillow", "graftwork"} <= set(info["versions"])


def test_damage_is_noticed(tuned: Path, tmp_path: Path) -> None:
    """A file cut off in transfer, or swapped, would predict nonsense with confidence."""
    broken = copy(tuned, tmp_path / "broken")
    content = bytearray((broken / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (broken / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="damaged or replaced"):
        load_model(broken)
    (broken / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        load_model(broken)


@pytest.mark.parametrize(
    ("text", "message"), [("", "damaged"), ("[]", "damaged"), ('{"format": "graftwork-model/9"}', "upgrade")]
)
def test_strange_info_is_refused(text: str, message: str, tmp_path: Path) -> None:
    """A newer or broken artifact must say so instead of failing somewhere inside."""
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_info(tmp_path)
    with pytest.raises(UserError, match=r"no model\.json"):
        read_info(tmp_path / "nowhere")


def test_scalars_keep_their_shape(tmp_path: Path) -> None:
    """BatchNorm's counter is a scalar: saved as a vector, the artifact no longer fits the network it came from."""
    save_model(tmp_path / "m", {"n": np.array(3)}, {"classes": []})
    from safetensors.numpy import load_file

    assert load_file(tmp_path / "m" / "model.safetensors")["n"].shape == ()


def test_failed_save_leaves_nothing(tmp_path: Path) -> None:
    """Half a model under its final name would be taken for a whole one."""
    with pytest.raises(ValueError):
        save_model(tmp_path / "m", {"n": np.zeros(3)}, {"classes": [], "bad": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_input_is_normalised_and_channels_last() -> None:
    """Another normalisation in service than in training is the classic silent loss of accuracy."""
    import torch

    preprocess = Preprocess(size=4, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
    images = torch.full((2, 4, 4, 3), 255, dtype=torch.uint8)
    x = preprocess.to_input(images, torch.device("cpu"))
    assert x.shape == (2, 3, 4, 4) and x.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(x[0, :, 0, 0].numpy(), [1.0, 3.0, 1.0], rtol=1e-6)


def test_prediction_does_not_depend_on_the_batch(tuned: Path) -> None:
    """One image must get the same answer alone and among others."""
    model = load_model(tuned, "cpu")
    images = [np.random.default_rng(n).integers(0, 255, (32, 32, 3), dtype=np.uint8) for n in range(70)]
    together = predict(model, images)
    alone = np.concatenate([predict(model, [image]) for image in images])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert predict(model, []).shape == (0, 10)
    assert json.dumps(model.info)


@pytest.mark.parametrize("engine", ["eager", "traced"])
@pytest.mark.parametrize("micro_batch", [3, 64])
def test_prediction_does_not_depend_on_how_it_is_run(engine: str, micro_batch: int, tuned: Path) -> None:
    """The figures of the evaluation must be those of the service, which runs the network in the plain way."""
    from graftwork.execution import Execution

    model = load_model(tuned, "cpu")
    images = [np.random.default_rng(n).integers(0, 255, (32, 32, 3), dtype=np.uint8) for n in range(10)]
    plain, done = predict(model, images), []
    how = Execution("contiguous", "fp32", engine, micro_batch, 1)
    np.testing.assert_allclose(predict(model, images, done.append, how), plain, atol=1e-5)
    assert done[-1] == 10 and predict(model, [], execution=how).shape == (0, 10)
