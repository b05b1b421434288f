"""``evaluate_model``: the Dataset artifact and the candidates in, the evaluation and its page out."""

from typing import Optional

from kfp import dsl

from graftwork.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate_model(
    dataset: dsl.Input[dsl.Dataset],
    baseline: dsl.Input[dsl.Model],
    fine_tuned: dsl.Input[dsl.Model],
    evaluation: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
    confusion: dsl.Output[dsl.ClassificationMetrics],
    scratch: Optional[dsl.Input[dsl.Model]] = None,
    embeddings: Optional[dsl.Input[dsl.Artifact]] = None,
    dataset_digest: str = "",
    embeddings_digest: str = "",
    baseline_digest: str = "",
    fine_tuned_digest: str = "",
    scratch_digest: str = "",
    confidence: float = 0.95,
    resamples: int = 2000,
    metric: str = "accuracy",
    slices: list = [],  # noqa: B006  KFP copies it into the spec
    corruptions: list = [],  # noqa: B006  KFP copies it into the spec
    attributions: bool = False,
    learning_curve: str = "",
    seed: int = 0,
):
    """Evaluates every candidate on the test images and chooses one on validation.

    Args:
        dataset: The packed examples.
        baseline: The linear probe on frozen features.
        fine_tuned: The fine-tuned network.
        evaluation: Metrics, pictures and per-example predictions.
        report: The same, for a person.
        metrics: Headline figures of the chosen candidate.
        confusion: Its confusion matrix and ROC curve.
        scratch: The control, trained from random weights.
        embeddings: The frozen features, by which the labels of train and validation are doubted.
        dataset_digest: Digest that the dataset must have.
        embeddings_digest: Digest that the embeddings must have.
        baseline_digest: Digest that the baseline's weights must have.
        fine_tuned_digest: Digest that the fine-tuned weights must have.
        scratch_digest: Digest that the control's weights must have.
        confidence: Of the bootstrap intervals.
        resamples: Of the bootstrap.
        metric: accuracy, macro_f1, auroc or loss, on validation.
        slices: Columns of the manifest by whose values the test is looked at.
        corruptions: Distortions that the test is repeated with.
        attributions: Of mistaken texts, show which words spoke for the label.
        learning_curve: curve.json of a learning curve on this data, for the report.
        seed: Of the bootstrap.
    """
    from graftwork import steps

    models = {"baseline": baseline.path, "fine_tuned": fine_tuned.path, "scratch": scratch.path if scratch else ""}
    digests = {"baseline": baseline_digest, "fine_tuned": fine_tuned_digest, "scratch": scratch_digest}
    found = steps.evaluate_model(
        dataset.path,
        dataset_digest,
        models,
        evaluation.path,
        report.path,
        metrics.path,
        digests=digests,
        embeddings_digest=embeddings_digest,
        embeddings=embeddings.path if embeddings else "",
        confidence=confidence,
        resamples=resamples,
        metric=metric,
        slices=slices,
        corruptions=corruptions,
        attributions=attributions,
        learning_curve=learning_curve,
        seed=seed,
    )
    metrics.metadata.update(found["metrics"])
    if len(found["labels"]) <= 100:  # KFP stores the matrix as metadata, which has a limit
        confusion.log_confusion_matrix(found["labels"], found["confusion"])
    if found["roc"]:
        confusion.log_roc_curve(found["roc"]["fpr"], found["roc"]["tpr"], found["roc"]["threshold"])
    open(confusion.path, "w").close()  # the local runner's cache wants a file for every output
