"""The registered model: a pyfunc made from this file (MLflow's "models from code"), so nothing of it is pickled.

Takes images as bytes, as base64 text, as paths or as arrays (H, W, 3) of uint8; gives the label and a probability a class.
The preprocessing is the training's own, from ``model.json``.
"""

import base64
import binascii
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.pyfunc import PythonModel

from graftwork.errors import UserError
from graftwork.images import Array, BrokenImageError, decode, fit, to_rgb
from graftwork.model import Model, load_model, predict


class Predictor(PythonModel):
    def load_context(self, context: Any) -> None:
        self.model: Model = load_model(context.artifacts["model"])

    # No annotations here: MLflow reads them as a schema for the inputs, and warns of every kind that it does not know.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Return a row an input: ``label``, then ``p_CLASS`` for every class. A broken image raises, with its position."""
        items = model_input.iloc[:, 0].tolist() if isinstance(model_input, pd.DataFrame) else list(model_input)
        pixels = []
        for position, item in enumerate(items):
            try:
                pixels.append(to_pixels(item, self.model))
            except (BrokenImageError, OSError, ValueError) as error:
                raise UserError(f"input {position}: {error}") from None
        probabilities = predict(self.model, pixels)
        classes = self.model.classes
        table = pd.DataFrame(probabilities, columns=[f"p_{c}" for c in classes])
        table.insert(0, "label", [classes[p] for p in probabilities.argmax(1)])
        return table


def to_pixels(item: Any, model: Model) -> Array:
    """Turn one input of any of the accepted kinds into the network's pixels, shape (size, size, 3)."""
    if isinstance(item, np.ndarray):
        from PIL import Image

        return fit(to_rgb(Image.fromarray(item)), model.preprocess)
    if isinstance(item, str):
        path = Path(item)
        # A path has a suffix or a separator that is rare in base64 of an image, which is long: text that names a file is a file.
        if len(item) < 4096 and path.is_file():
            item = path.read_bytes()
        else:
            try:
                item = base64.b64decode(item, validate=True)
            except binascii.Error:
                raise ValueError("is neither a file nor base64") from None
    if not isinstance(item, (bytes, bytearray, memoryview)):
        raise ValueError(f"is a {type(item).__name__}; give bytes, base64 text, a path or an array")
    return fit(decode(bytes(item)), model.preprocess)


mlflow.models.set_model(Predictor())
