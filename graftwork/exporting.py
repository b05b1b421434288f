"""A model as one ONNX file, for programs without Python or torch: fitted uint8 pixels in, logits and calibrated probabilities out.

The normalisation and the temperature are in the graph, so that they cannot be forgotten or done otherwise. What is left to the caller is
decoding and fitting; how, is in the file's metadata.
"""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from graftwork import __version__
from graftwork.calibration import probabilities
from graftwork.errors import UserError, one_line
from graftwork.modality import inputs, name_of
from graftwork.model import Model, load_model, predict_logits, read_info
from graftwork.predicting import finished_file
from graftwork.sources.record import NOUNS

if TYPE_CHECKING:
    from graftwork.images import Preprocess as ImagePreprocess

OPSET = 18
TOLERANCE = 1e-4  # of a probability
ONE_FILE_BYTES = 2_000_000_000  # a protobuf holds no more than 2 GiB
PACKAGES = ("onnx", "onnxruntime", "onnxscript")


def export_onnx(folder: Path, output: Path) -> dict[str, Any]:
    """Write the Model artifact in ``folder`` to ``output``; return "opset", "megabytes" and "difference", the largest of a probability.

    The graph takes ``pixels``, uint8 (N, S, S, 3), RGB, fitted; it gives ``logits`` and ``probabilities``, float32 (N, classes). It is
    run by onnxruntime on random pixels and compared with the model before it takes its name.

    Raises:
        UserError: a package is missing, the network cannot be exported, its results differ, or ``output`` cannot be written.
    """
    check_packages()
    if output.is_dir():
        raise UserError(f"output {one_line(output)}: cannot be written (Is a directory); give another path")
    info = read_info(folder)
    if not inputs(info).ONNX:
        raise UserError(
            f"model {one_line(folder)}: models for {NOUNS[name_of(info)]} cannot be exported to ONNX as yet; `graftwork serve` answers over HTTP, "
            "and mlflow.pyfunc.load_model loads it in Python"
        )
    model = load_model(folder, "cpu")
    size_bytes = 4 * int(model.info.get("parameters", 0))
    if size_bytes > ONE_FILE_BYTES:
        raise UserError(
            f"model {one_line(folder)}: has {size_bytes / 1e9:.1f} GB of weights, more than one ONNX file holds; export a smaller backbone"
        )
    import onnx

    graph = to_onnx(model, folder)
    for name, value in metadata(model).items():
        graph.metadata_props.add(key=name, value=value)
    try:
        with finished_file(output) as partial:
            partial.write_bytes(graph.SerializeToString())
            onnx.checker.check_model(str(partial), full_check=True)
            off = difference(model, partial)
            if not off < TOLERANCE:
                raise UserError(
                    f"model {one_line(folder)}: its ONNX graph gives probabilities that differ by {off:.2g}, more than {TOLERANCE}; it is not kept; "
                    "try other versions of torch and onnxruntime"
                )
            written = partial.stat().st_size
    except OSError as error:
        raise UserError(
            f"output {one_line(output)}: cannot be written ({error.strerror or one_line(error, 120)}); give another path"
        ) from None
    except onnx.checker.ValidationError as error:
        raise UserError(
            f"model {one_line(folder)}: its ONNX graph is not valid ({one_line(error, 120)}); try another version of torch"
        ) from None
    opset = next(o.version for o in graph.opset_import if o.domain in ("", "ai.onnx"))
    return {"opset": opset, "megabytes": written / 1e6, "difference": off}


def check_packages() -> None:
    """Raise UserError where a package of the extra is missing."""
    from importlib.util import find_spec

    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(f"export to ONNX: needs {', '.join(missing)}; pip install 'graftwork[onnx]'")


def to_onnx(model: Model, folder: Path) -> Any:
    """Return the graph, an ``onnx.ModelProto`` with its weights in it."""
    import torch
    from torch import nn

    class Whole(nn.Module):
        """From pixels to probabilities."""

        mean: torch.Tensor
        std: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.network = model.network
            for name in ("mean", "std"):
                values = torch.tensor(getattr(of_images(model), name)).mul(255).view(1, 3, 1, 1)
                self.register_buffer(name, values, persistent=False)

        def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            # As model.to_input.
            x = pixels.permute(0, 3, 1, 2).float().sub(self.mean).div(self.std)
            logits = self.network(x)
            return logits, torch.softmax(logits / model.temperature, 1)

    size = of_images(model).size
    # Two at once: the exporter takes a batch of one for a batch that is always one.
    example = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    model.network.to(memory_format=torch.contiguous_format)
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                Whole().eval(),
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["pixels"],
                output_names=["logits", "probabilities"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
    except (
        Exception
    ) as error:  # whatever the exporter, or timm's code below it, makes of a network that it cannot trace
        raise UserError(
            f"model {one_line(folder)}: {model.info['backbone']} cannot be exported to ONNX "
            f"({one_line(f'{type(error).__name__}: {error}'.strip().partition(chr(10))[0], 160)}); export another backbone"
        ) from None
    assert program is not None
    return program.model_proto


def of_images(model: Model) -> "ImagePreprocess":
    return cast("ImagePreprocess", model.preprocess)


def metadata(model: Model) -> dict[str, str]:
    """Return what is written into the file beside the graph."""
    return {
        "classes": json.dumps(model.classes, ensure_ascii=False),
        "preprocess": json.dumps(model.preprocess.model_dump(), ensure_ascii=False),
        "temperature": repr(model.temperature),
        "backbone": str(model.info["backbone"]),
        "sha256": str(model.info["sha256"]),
        "graftwork": __version__,
    }


def difference(model: Model, file: Path) -> float:
    """Return the largest difference of a probability between ``file`` and the model, on random pixels in batches of one and of five."""
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(0)
    worst, size = 0.0, of_images(model).size
    for count in (1, 5):
        pixels = generator.integers(0, 256, (count, size, size, 3), np.uint8)
        expected = probabilities(predict_logits(model, pixels), model.temperature)
        (found,) = session.run(["probabilities"], {"pixels": pixels})
        if found.shape != expected.shape or not np.isfinite(found).all():
            return float("inf")
        worst = max(worst, float(np.abs(found - expected).max()))
    return worst


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's progress, warnings and logs from the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            yield
    finally:
        logging.disable(before)
