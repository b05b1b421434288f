"""``register_model``: the evaluation and the candidates in, a registry version and a decision out."""

from typing import Optional

from kfp import dsl

from graftwork.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def register_model(
    dataset: dsl.Input[dsl.Dataset],
    evaluation: dsl.Input[dsl.Artifact],
    baseline: dsl.Input[dsl.Model],
    fine_tuned: dsl.Input[dsl.Model],
    decision: dsl.Output[dsl.Artifact],
    scratch: Optional[dsl.Input[dsl.Model]] = None,
    dataset_digest: str = "",
    register_as: str = "",
    min_gain: float = 0.0,
):
    """Registers the chosen candidate in MLflow; it becomes champion if it beats the champion and the baseline.

    Args:
        dataset: The packed examples.
        evaluation: Metrics of the candidates, and which one was chosen.
        baseline: The linear probe on frozen features.
        fine_tuned: The fine-tuned network.
        decision: What was decided, and why, as JSON.
        scratch: The control, trained from random weights.
        dataset_digest: Digest that the dataset must have.
        register_as: Name in the registry; empty takes the dataset's.
        min_gain: Test accuracy by which the champion must be beaten.
    """
    from graftwork import steps

    models = {"baseline": baseline.path, "fine_tuned": fine_tuned.path, "scratch": scratch.path if scratch else ""}
    steps.register_model(
        dataset.path, dataset_digest, evaluation.path, models, decision.path, register_as=register_as, min_gain=min_gain
    )
