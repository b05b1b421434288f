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
    )
    metrics.metadata.update(found)
