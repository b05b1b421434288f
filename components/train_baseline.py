"""``train_baseline``: the Embeddings artifact in, a Model artifact out."""

from kfp import dsl

from graftwork.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def train_baseline(
    embeddings: dsl.Input[dsl.Artifact],
    model: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    embeddings_digest: str = "",
) -> str:
    """Fits a regularised linear probe on frozen features and folds it into the network's head; returns the weights' digest.

    Args:
        embeddings: Features of each image and the backbone that made them.
        model: The baseline, a model like any other.
        metrics: Its validation accuracy.
        embeddings_digest: Digest that the embeddings must have.
    """
    from graftwork import steps

    metrics.metadata.update(steps.train_baseline(embeddings.path, model.path, metrics.path, embeddings_digest))
    return steps.model_digest(model.path)
