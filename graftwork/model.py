"""The Model artifact: a folder with ``model.safetensors`` and ``model.json``, nothing that unpickles. Saving and loading it, and predicting with it.

The module itself needs neither torch nor timm: the baseline, which only changes a head, is made without them.
"""

import ctypes
import hashlib
import json
import platform
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from graftwork import __version__
from graftwork.calibration import probabilities
from graftwork.errors import UserError
from graftwork.files import finished_folder, write_json
from graftwork.modality import Array, Preprocess, backbones, transforms

if TYPE_CHECKING:
    import torch

    from graftwork.execution import Execution

FORMAT = "graftwork-model/1"
Floats = npt.NDArray[np.float32]


class Model(NamedTuple):
    """A Model artifact, loaded: the network in evaluation mode on ``device``."""

    network: Any  # an nn.Module with timm's methods
    info: dict[str, Any]
    preprocess: Preprocess
    device: "torch.device"

    @property
    def classes(self) -> list[str]:
        return list(self.info["classes"])

    @property
    def temperature(self) -> float:
        """What the logits are divided by before they become probabilities; 1 in models older than it."""
        return float(self.info.get("temperature", 1.0))


def save_model(
    folder: Path,
    tensors: dict[str, npt.NDArray[Any]],
    info: dict[str, Any],
    beside: dict[str, dict[str, npt.NDArray[Any]]] | None = None,
    files: dict[str, bytes] | None = None,
) -> dict[str, Any]:
    """Write ``tensors`` (name: array) and ``info`` as a Model artifact; return ``model.json``, with the digest and the versions added.

    ``beside`` are further safetensors files, by name, for the steps that follow; ``files``, what the preprocessing needs. ``info`` holds
    modality, backbone, backbone_args, head, classes, preprocess, weights, candidate, dataset_digest, seconds, selection and temperature.
    """
    from safetensors.numpy import save_file

    with finished_folder(folder) as partial:
        for name, content in {"model.safetensors": tensors, **(beside or {})}.items():
            save_file({k: np.asarray(v, order="C") for k, v in content.items()}, partial / name)
        for name, data in (files or {}).items():
            (partial / name).write_bytes(data)
        info = {
            "format": FORMAT,
            **info,
            "sha256": file_sha256(partial / "model.safetensors"),
            "parameters": int(sum(v.size for v in tensors.values())),
            "versions": {
                "graftwork": __version__,
                "python": platform.python_version(),
                **{m: version(m) for m in ("torch", "numpy", *transforms(info).LIBRARIES)},
            },
        }
        write_json(partial / "model.json", info)
    return info


def read_info(folder: str | Path) -> dict[str, Any]:
    """Read ``model.json``.

    Raises:
        UserError: there is no Model artifact in ``folder``, or a newer one than this version reads.
    """
    path = Path(folder) / "model.json"
    try:
        info: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind = info["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"model {folder}: is no Model folder ({'no model.json' if isinstance(error, OSError) else 'model.json is damaged'}); "
            "give a Model folder or models:/NAME@champion"
        ) from None
    if kind != FORMAT:
        raise UserError(f"model {folder}: has the format {kind!r}, this version reads {FORMAT!r}; upgrade graftwork")
    return info


def read_tensors(folder: str | Path, info: dict[str, Any]) -> dict[str, npt.NDArray[Any]]:
    """Read ``model.safetensors`` after comparing its digest with the one in ``model.json``."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = Path(folder) / "model.safetensors"
    try:
        if file_sha256(path) != info["sha256"]:
            raise UserError(
                f"model {folder}: model.safetensors is not the file that model.json describes (damaged or replaced); train or fetch it again"
            )
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"model {folder}: model.safetensors cannot be read ({error}); train or fetch it again"
        ) from None


def load_model(folder: str | Path, device: str = "auto") -> Model:
    """Load a Model artifact for prediction, on "cpu", "cuda", "mps" or the best there is ("auto")."""
    import torch

    info = read_info(folder)
    tensors = read_tensors(folder, info)
    made = backbones(info)
    made.check_name(info["backbone"])
    network = made.build(info["backbone"], info["backbone_args"], len(info["classes"]))
    try:
        network.load_state_dict({k: torch.from_numpy(v) for k, v in tensors.items()})
    except RuntimeError:
        raise UserError(
            f"model {folder}: its weights do not fit {info['backbone']} as the libraries here build it; install "
            + ", ".join(f"{name} {info['versions'][name]}" for name in transforms(info).LIBRARIES)
        ) from None
    target = ready_device(device)
    network = network.to(target, memory_format=torch.channels_last).eval()
    return Model(network, info, transforms(info).read_preprocess(info["preprocess"], Path(folder)), target)


def ready_device(name: str = "auto") -> "torch.device":
    """Return the device to compute on, made ready: "cpu", "cuda", "mps", or the best there is ("auto")."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cpu":
        keep_freed_memory()
        from graftwork.parallel import cores

        if torch.get_num_threads() > cores():
            torch.set_num_threads(cores())
    return torch.device(name)


def keep_freed_memory() -> None:
    """Have glibc keep what it frees for the next batch, instead of giving it back to the kernel and asking for it again.

    Activations are larger than the 32 MiB up to which glibc keeps blocks: each batch, the kernel maps and clears them anew.
    Measured on two cores, EfficientNet-Lite0, 96 pixels, batches of 64, on days of different speed: 1.15 to 1.8 times the images a
    second in inference, 1 to 1.4 times in training, and the seconds spent in the kernel from 66 to 10, at a tenth more memory. Other C
    libraries are left as they are.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # from malloc.h
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def batches(examples: Iterable[Array], preprocess: Preprocess, size: int = 64) -> "Iterator[torch.Tensor]":
    """Stack up to ``size`` examples at a time; the next batch is made while the caller works on this one."""
    iterator = iter(examples)

    def take() -> "torch.Tensor | None":
        chunk = [example for _, example in zip(range(size), iterator, strict=False)]
        return preprocess.stack(chunk) if chunk else None

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(take)
        while (batch := following.result()) is not None:
            following = pool.submit(take)
            yield batch


def predict(
    model: Model,
    examples: Iterable[Array],
    progress: Callable[[int], None] = lambda done: None,
    execution: "Execution | None" = None,
) -> Floats:
    """Return the calibrated class probabilities of ``examples``, shape (N, classes), float32; arguments as for ``predict_logits``."""
    return probabilities(predict_logits(model, examples, progress, execution), model.temperature)


def predict_logits(
    model: Model,
    examples: Iterable[Array],
    progress: Callable[[int], None] = lambda done: None,
    execution: "Execution | None" = None,
) -> Floats:
    """Return the logits of ``examples``, each as ``model.preprocess.example`` gives it, shape (N, classes), float32.

    ``execution`` says how the network is run; without one it is run as is right for a few examples.
    """
    from graftwork.execution import Inference, default_execution
    from graftwork.settings import ExecutionSettings

    usual = default_execution(ExecutionSettings(), model.device, model.preprocess)
    run = Inference(model.network, model.preprocess, model.device, execution or usual)
    found, done = [], 0
    for batch in batches(examples, model.preprocess, run.execution.micro_batch):
        found.append(run(batch).numpy())
        done += len(batch)
        progress(done)
    return np.concatenate(found) if found else np.zeros((0, len(model.classes)), np.float32)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
