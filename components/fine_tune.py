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
    baseline_digest: str = "",
    memory_format: str = "auto",
    precision: str = "auto",
    engine: str = "auto",
    micro_batch: int = 0,
    threads: int = 0,
    plan_seconds: float = 120.0,
    strategy: str = "auto",
    lp_ft: bool = True,
    batchnorm: str = "auto",
    epochs: int = 0,
    batch_size: int = 0,
    optimizer: str = "adamw",
    learning_rate: float = 0.0,
    rate_test: bool = False,
    schedule: str = "cosine",
    warmup: float = 0.1,
    layer_decay: float = 0.0,
    reset_layers: int = 0,
    weight_decay: float = 0.05,
    clip_norm: float = 1.0,
    label_smoothing: float = 0.1,
    mixup: float = -1.0,
    cutmix: float = 0.0,
    balance: str = "auto",
    ema_decay: float = 0.98,
    wise_ft: bool = False,
    soup: int = 0,
    metric: str = "accuracy",
    patience: int = 4,
    seeds: int = 1,
    flip: str = "auto",
    shift: float = 0.05,
    memory_share: float = 0.3,
    checkpoint_seconds: float = 30.0,
    seed: int = 0,
) -> str:
    """Fine-tunes from the baseline's head, or trains from scratch as a control; keeps the best epoch; returns the weights' digest.

    Args:
        dataset: The packed examples.
        baseline: The linear probe, from which training starts.
        model: The weights of the best epoch.
        metrics: Its validation accuracy.
        dataset_digest: Digest that the dataset must have.
        baseline_digest: Digest that the baseline's weights must have.
        memory_format: auto, channels_last or contiguous.
        precision: auto, fp32, bf16 or fp16.
        engine: auto, eager, traced or compiled.
        micro_batch: Examples that pass through the network at once; 0 chooses.
        threads: Of the CPU; 0 chooses, at most the cores of the container.
        plan_seconds: Most that timing how to run the network may take; 0 times nothing.
        strategy: auto, head, last-blocks, gradual, full or scratch.
        lp_ft: Start from the baseline's head.
        batchnorm: auto, frozen or trained statistics.
        epochs: 0 chooses by the number of labels.
        batch_size: Examples in an optimiser step; 0 chooses by the number of labels.
        optimizer: adamw, sgd or schedule-free.
        learning_rate: Of the head; 0 takes the strategy's own.
        rate_test: Find the learning rate by a range test first.
        schedule: cosine, one-cycle, step, plateau or constant.
        warmup: Share of the steps in which the rate rises.
        layer_decay: Factor on the rate from one layer to the one before it; 0 takes the backbone's own.
        reset_layers: Highest layers of a text network that get new random weights first.
        weight_decay: Of AdamW.
        clip_norm: Largest norm of the gradient; 0 takes any.
        label_smoothing: Probability mass given to the other classes.
        mixup: Alpha of mixup; 0 is none, -1 chooses by the number of labels.
        cutmix: Alpha of CutMix; 0 is none.
        balance: auto, none, sampling or weights.
        ema_decay: Of the averaged weights; 0 takes no average.
        wise_ft: Average with the baseline where validation gains by it.
        soup: Average up to so many of the best epochs where validation gains by it.
        metric: accuracy, macro_f1, auroc or loss, on validation.
        patience: Epochs without a better validation accuracy after which training stops.
        seeds: Trained with, from seed on; the best on validation is kept.
        flip: auto, yes or no: mirror half of the training images.
        shift: Largest random shift, as a share of the side.
        memory_share: Share of the free memory up to which decoded images are held.
        checkpoint_seconds: Between checkpoints; 0 writes none.
        seed: Fixes the order, the augmentation and the initial weights.
    """
    from graftwork import steps

    found = steps.fine_tune(
        dataset.path,
        dataset_digest,
        baseline.path,
        model.path,
        metrics.path,
        baseline_digest,
        memory_format=memory_format,
        precision=precision,
        engine=engine,
        micro_batch=micro_batch,
        threads=threads,
        plan_seconds=plan_seconds,
        strategy=strategy,
        lp_ft=lp_ft,
        batchnorm=batchnorm,
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer,
        learning_rate=learning_rate,
        rate_test=rate_test,
        schedule=schedule,
        warmup=warmup,
        layer_decay=layer_decay,
        reset_layers=reset_layers,
        weight_decay=weight_decay,
        clip_norm=clip_norm,
        label_smoothing=label_smoothing,
        mixup=mixup,
        cutmix=cutmix,
        balance=balance,
        ema_decay=ema_decay,
        wise_ft=wise_ft,
        soup=soup,
        metric=metric,
        patience=patience,
        seeds=seeds,
        flip=flip,
        shift=shift,
        memory_share=memory_share,
        checkpoint_seconds=checkpoint_seconds,
        seed=seed,
    )
    metrics.metadata.update(found)
    return steps.model_digest(model.path)
