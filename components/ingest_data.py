"""``ingest_data``: a source in, the Dataset artifact out."""

from kfp import dsl

from graftwork.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def ingest_data(
    dataset: dsl.Output[dsl.Dataset],
    data: str = "fashion-mnist",
    modality: str = "auto",
    text_column: str = "",
    label_column: str = "",
    source_fingerprint: str = "",
    train_per_class: int = 0,
    test_per_class: int = 0,
    val_fraction: float = 0.2,
    test_fraction: float = 0.2,
    split_by: str = "content",
    slices: list = [],  # noqa: B006  KFP copies it into the spec
    max_pixels: int = 100000000,
    max_side: int = 1024,
    max_characters: int = 1000000,
    seed: int = 0,
) -> str:
    """Packs labelled images or texts into manifest.parquet and uncompressed shards, with stable stratified splits.

    Args:
        dataset: The packed examples.
        data: Folder (CLASS/*.jpg or train|val|test/CLASS/*.jpg), table or manifest (.csv, .parquet, .jsonl), archive, s3:// URI or named dataset.
        modality: auto, image or text.
        text_column: Of a table of texts; empty finds it by its name.
        label_column: Of a table of texts; empty finds it by its name.
        source_fingerprint: What the source looked like; a new value packs it again.
        train_per_class: Examples a class for training, with validation in proportion; 0 takes all.
        test_per_class: Examples a class for the test; 0 takes all.
        val_fraction: Share cut out for validation where the source has none of its own.
        test_fraction: Share cut out for the test where the source has none of its own.
        split_by: What splits are cut by: content (or group), or time.
        slices: Columns of the manifest to keep, by whose values the test is looked at.
        max_pixels: A larger image counts as broken.
        max_side: An image whose shorter side is longer is scaled down once; 0 scales none.
        max_characters: A longer text counts as broken.
        seed: Fixes the splits and the choice of examples.

    Returns:
        The digest of contents, labels and splits.
    """
    from graftwork import steps

    digest = steps.ingest_data(
        dataset.path,
        data=data,
        modality=modality,
        text_column=text_column,
        label_column=label_column,
        source_fingerprint=source_fingerprint,
        train_per_class=train_per_class,
        test_per_class=test_per_class,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        split_by=split_by,
        slices=slices,
        max_pixels=max_pixels,
        max_side=max_side,
        max_characters=max_characters,
        seed=seed,
    )
    dataset.metadata["digest"] = digest
    return digest
