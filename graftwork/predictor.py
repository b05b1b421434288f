"""The registered model: a pyfunc made from this file (MLflow's "models from code"), so nothing of it is pickled.

Takes images as bytes, as base64 text, as paths or as arrays (H, W, 3) of uint8, or texts; gives the label and a probability a class.
The preprocessing is the training's own, from ``model.json``.
"""

from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel

from graftwork.errors import UserError, one_line
from graftwork.modality import BrokenExampleError, inputs
from graftwork.model import Model, load_model, predict


class Predictor(PythonModel):
    def load_context(self, context: Any) -> None:
        self.model: Model = load_model(context.artifacts["model"])

    # No annotations here: MLflow reads them as a schema for the inputs, and warns of every kind that it does not know.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Return a row an input: ``label``, then ``p_CLASS`` for every class. A broken one raises, with its position."""
        kind = inputs(self.model.info)
        try:
            items = kind.from_table(model_input) if isinstance(model_input, pd.DataFrame) else list(model_input)
        except ValueError as error:
            raise UserError(f"input: {one_line(error)}") from None
        examples = []
        for position, item in enumerate(items):
            try:
                examples.append(kind.from_python(item, self.model.preprocess))
            except (BrokenExampleError, OSError, ValueError) as error:
                raise UserError(f"input {position}: {error}") from None
        probabilities = predict(self.model, examples)
        classes = self.model.classes
        table = pd.DataFrame(probabilities, columns=[f"p_{c}" for c in classes])
        table.insert(0, "label", [classes[p] for p in probabilities.argmax(1)])
        return table


mlflow.models.set_model(Predictor())
