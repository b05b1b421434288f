"""``fine_tune``: the Dataset artifact and the baseline in, a Model artifact out."""

from kfp import dsl

from graftwork.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def fine_tune(
    dataset: dsl.Input[dsl.Dataset],
    baseline: dsl.Input[dsl.Model],
    model: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    dataset_digest: str = "",
    strategy: str = "auto",
    epochs: int = 0,
    batch_size: int = 0,
    learning_rate: float = 0.0,
    layer_decay: float = 0.9,
    weight_decay: float = 0.05,
    warmup: float = 0.1,
    label_smoothing: float = 0.1,
    ema_decay: float = 0.98,
    patience: int = 4,
    flip: bool = True,
    shift: float = 0.05,
    seed: int = 0,
):
    """Fine-tunes from the baseline's head, or trains from scratch as a control; keeps the best epoch.

    Args:
        dataset: The packed examples.
        baseline: The linear probe, from which training starts.
        model: The weights of the best epoch.
        metrics: Its validation accuracy.
        dataset_digest: Digest that the dataset must have.
        strategy: auto, head, last-blocks, full or scratch.
        epochs: 0 chooses by the number of labels.
        batch_size: Examples in an optimiser step; 0 chooses by the number of labels.
        learning_rate: Of the head; 0 takes the strategy's own.
        layer_decay: Factor on the rate from one layer to the one before it.
        weight_decay: Of AdamW.
        warmup: Share of the steps in which the rate rises.
        label_smoothing: Probability mass given to the other classes.
        ema_decay: Of the averaged weights; 0 takes no average.
        patience: Epochs without a better validation accuracy after which training stops.
        flip: Mirror half of the training images.
        shift: Largest random shift, as a share of the side.
        seed: Fixes the order, the augmentation and the initial weights.
    """
    from graftwork import steps

    found = steps.fine_tune(
        dataset.path,
        dataset_digest,
        baseline.path,
        model.path,
        metrics.path,
        strategy=strategy,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        layer_decay=layer_decay,
        weight_decay=weight_decay,
        warmup=warmup,
        label_smoothing=label_smoothing,
        ema_decay=ema_decay,
        patience=patience,
        flip=flip,
        shift=shift,
        seed=seed,
    )
    metrics.metadata.update(found)
