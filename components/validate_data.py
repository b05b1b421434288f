"""``validate_data``: the Dataset artifact in, a page out; a critical finding stops the run."""

from kfp import dsl

from graftwork.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def validate_data(
    dataset: dsl.Input[dsl.Dataset],
    report: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
    dataset_digest: str = "",
    max_broken: float = 0.05,
    min_per_class: int = 3,
    min_side: int = 8,
    max_aspect: float = 8.0,
    min_contrast: float = 2.0,
    min_characters: int = 2,
    long_text: int = 10000,
    max_imbalance: float = 50.0,
    max_drift: float = 0.1,
    near_duplicates: bool = True,
    classes: list = [],  # noqa: B006  KFP copies it into the spec
    suite: str = "",
    reference: str = "champion",
    register_as: str = "",
):
    """Judges the dataset by a Great Expectations suite.

    Args:
        dataset: The packed examples.
        report: What passed and what did not, for a person.
        metrics: Counts of rules and findings.
        dataset_digest: Digest that the dataset must have.
        max_broken: Largest share of broken images; more stop the run.
        min_per_class: Fewest usable images a class.
        min_side: Images with a shorter side, in pixels, are warned of.
        max_aspect: Images that are longer, by their shorter side, are warned of.
        min_contrast: Images with a smaller standard deviation of grey are warned of as blank.
        min_characters: Shorter texts are warned of.
        long_text: Characters; longer texts are warned of.
        max_imbalance: Training images of the largest class by those of the smallest; more is warned of.
        max_drift: Population stability index against the champion's data; more is warned of.
        near_duplicates: Look for scaled, cropped and re-encoded copies in other splits.
        classes: The classes that there must be; empty allows any.
        suite: YAML that changes rules and adds expectations.
        reference: What drift is judged against; champion, none, a Dataset folder or a profile.
        register_as: Name in the model registry, where the champion is; empty takes the dataset's.
    """
    from graftwork import steps

    found = steps.validate_data(
        dataset.path,
        dataset_digest,
        report.path,
        metrics.path,
        max_broken=max_broken,
        min_per_class=min_per_class,
        min_side=min_side,
        max_aspect=max_aspect,
        min_contrast=min_contrast,
        min_characters=min_characters,
        long_text=long_text,
        max_imbalance=max_imbalance,
        max_drift=max_drift,
        near_duplicates=near_duplicates,
        classes=classes,
        suite=suite,
        reference=reference,
        register_as=register_as,
    )
    metrics.metadata.update(found)
