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
    report: dsl.Output[dsl.HTML],
    scratch: Optional[dsl.Input[dsl.Model]] = None,
    validation: Optional[dsl.Input[dsl.Metrics]] = None,
    dataset_digest: str = "",
    register_as: str = "",
    policy: str = "",
):
    """Registers the chosen candidate in MLflow; it becomes champion if the policy's rules say so.

    Args:
        dataset: The packed examples.
        evaluation: Metrics of the candidates, and which one was chosen.
        baseline: The linear probe on frozen features.
        fine_tuned: The fine-tuned network.
        decision: What was decided, and why, as JSON.
        report: The evaluation's page, with the decision first.
        scratch: The control, trained from random weights.
        validation: Counts of the data's validation.
        dataset_digest: Digest that the dataset must have.
        register_as: Name in the registry; empty takes the dataset's.
        policy: YAML that says who becomes champion; empty takes the defaults.
    """
    from graftwork import steps

    models = {"baseline": baseline.path, "fine_tuned": fine_tuned.path, "scratch": scratch.path if scratch else ""}
    steps.register_model(
        dataset.path,
        dataset_digest,
        evaluation.path,
        models,
        decision.path,
        report.path,
        validation=validation.path if validation else "",
        register_as=register_as,
        policy=policy,
    )
