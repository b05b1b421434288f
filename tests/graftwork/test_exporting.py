"""Export to ONNX: one file that gives what the model gives, or none."""

import json
from pathlib import Path

import numpy as np
import pytest

from graftwork.errors import UserError
from graftwork.exporting import export_onnx
from graftwork.model import load_model, predict

ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def test_the_file_gives_what_the_model_gives(baseline: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A graph with another normalisation or without the temperature gives plausible, wrong probabilities."""
    info = json.loads((baseline / "model.json").read_text())
    found = export_onnx(baseline, tmp_path / "m.onnx")
    assert found["difference"] < 1e-4 and [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert not "".join(capfd.readouterr()), "the exporter talks"
    session = ort.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    meta = session.get_modelmeta().custom_metadata_map
    assert json.loads(meta["classes"]) == info["classes"] and meta["sha256"] == info["sha256"]
    model = load_model(baseline, "cpu")
    assert json.loads(meta["preprocess"])["size"] == model.preprocess.size
    pixels = np.random.default_rng(3).integers(0, 256, (7, model.preprocess.size, model.preprocess.size, 3), np.uint8)
    logits, probabilities = session.run(["logits", "probabilities"], {"pixels": pixels})
    assert np.abs(probabilities - predict(model, pixels)).max() < 1e-4 and logits.shape == probabilities.shape


def test_what_cannot_be_written_is_told(baseline: Path, tmp_path: Path) -> None:
    """A trace after a minute of export tells nobody that the folder was the mistake."""
    with pytest.raises(UserError, match="cannot be written"):
        export_onnx(baseline, tmp_path)
    assert not list(tmp_path.iterdir())
