"""Validation: a Great Expectations suite over the manifest, with a severity a rule, and a small HTML page of our own.

What a rule needs is first computed as a column, then expected of: the columns are plain pandas, the judging is Great Expectations'.
"""

import logging
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import pandas as pd

from graftwork.dataset import SPLITS, Dataset
from graftwork.errors import one_line
from graftwork.report import render_validation
from graftwork.settings import ValidateSettings

EXAMPLES = 5  # shown of each finding


class Rule(NamedTuple):
    """One expectation on one table, and how to say that it failed."""

    name: str
    severity: str  # "critical" or "warning"
    table: str  # "examples" or "classes"
    expectation: Any
    failed: str  # what is wrong and what to do; {count} and {examples} are filled in
    bad: "pd.Series[bool] | None" = None  # the rows that break the rule


class Validation(NamedTuple):
    summary: dict[str, Any]  # JSON-ready: rules with their results, counts
    html: str
    critical: list[str]
    warnings: list[str]


def validate(dataset: Dataset, settings: ValidateSettings) -> Validation:
    """Judge ``dataset`` by the suite. An expectation that raises counts as a critical failure: it proved nothing."""
    examples, classes = tables(dataset)
    rules = suite(examples, classes, dataset, settings)
    outcomes = run_great_expectations({"examples": examples, "classes": classes}, rules)
    results = []
    for rule in rules:
        passed, exception = outcomes[rule.name]
        frame = examples if rule.table == "examples" else classes
        rows = frame[rule.bad] if rule.bad is not None else frame.iloc[:0]
        shown = [one_line(v, 80) for v in rows["source" if rule.table == "examples" else "label"].head(EXAMPLES)]
        message = (
            f"{rule.name}: could not be checked ({one_line(exception)})"
            if exception
            else f"{rule.name}: {rule.failed.format(count=len(rows), examples=', '.join(shown))}"
        )
        severity = "critical" if exception else rule.severity
        results.append(
            {
                "rule": rule.name,
                "severity": severity,
                "passed": passed,
                "count": 0 if passed else len(rows),
                "examples": [] if passed else shown,
                "message": "" if passed else message,
            }
        )
    failed = [r for r in results if not r["passed"]]
    critical = [str(r["message"]) for r in failed if r["severity"] == "critical"]
    warnings = [str(r["message"]) for r in failed if r["severity"] == "warning"]
    summary = {
        "dataset": dataset.info["name"],
        "digest": dataset.digest,
        "passed": not critical,
        "counts": {
            "rules": len(rules),
            "critical": len(critical),
            "warnings": len(warnings),
            "broken": len(dataset.info["broken"]),
        },
        "rules": results,
        "broken": dataset.info["broken"][:200],
        "skipped": dataset.info["skipped"],
        "classes": dataset.info["counts"],
    }
    return Validation(summary, render_validation(summary), critical, warnings)


def tables(dataset: Dataset) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return (a row an example, broken ones included; a row a class), with a column for whatever a rule looks at."""
    good = dataset.manifest.select(["source", "label", "split", "sha256", "width", "height"]).to_pandas()
    good["decodable"] = True
    good["splits_with_this_content"] = good.groupby("sha256")["split"].transform("nunique")
    good["labels_with_this_content"] = good.groupby("sha256")["label"].transform("nunique")
    good["side"] = good[["width", "height"]].min(axis=1)
    broken = pd.DataFrame(dataset.info["broken"], columns=["source", "label", "reason"]).assign(decodable=False)
    examples = pd.concat([good, broken.drop(columns="reason")], ignore_index=True)
    counts = dataset.info["counts"]
    classes = pd.DataFrame(
        {"label": dataset.classes, **{split: [counts[split][c] for c in dataset.classes] for split in SPLITS}}
    )
    classes["total"] = classes[list(SPLITS)].sum(axis=1)
    return examples, classes


def suite(examples: pd.DataFrame, classes: pd.DataFrame, dataset: Dataset, settings: ValidateSettings) -> list[Rule]:
    import great_expectations.expectations as gxe

    broken = ~examples["decodable"].astype(bool)
    between = gxe.ExpectColumnValuesToBeBetween
    return [
        Rule(
            "decodable",
            "critical",
            "examples",
            gxe.ExpectColumnValuesToBeInSet(
                column="decodable", value_set=[True], mostly=round(1 - settings.max_broken, 9)
            ),
            f"{{count}} of {len(examples)} images cannot be decoded, more than the {settings.max_broken:.0%} allowed "
            "({examples}); mend or remove them, or raise max_broken",
            broken,
        ),
        Rule(
            "all_decodable",
            "warning",
            "examples",
            gxe.ExpectColumnValuesToBeInSet(column="decodable", value_set=[True]),
            "{count} images cannot be decoded and are left out ({examples})",
            broken,
        ),
        Rule(
            "label_set",
            "critical",
            "examples",
            gxe.ExpectColumnValuesToBeInSet(column="label", value_set=dataset.classes),
            "{count} examples have a label outside the class list ({examples}); run ingest_data again",
            ~examples["label"].isin(dataset.classes),
        ),
        Rule(
            "content_in_one_split",
            "critical",
            "examples",
            between(column="splits_with_this_content", max_value=1),
            "{count} images are in more than one split ({examples}): the test would be of what was learned; keep each in one split",
            examples["splits_with_this_content"] > 1,
        ),
        Rule(
            "content_has_one_label",
            "warning",
            "examples",
            between(column="labels_with_this_content", max_value=1),
            "{count} images have the same content as another with another label ({examples}); decide which label is right",
            examples["labels_with_this_content"] > 1,
        ),
        Rule(
            "size",
            "warning",
            "examples",
            between(column="side", min_value=settings.min_side),
            f"{{count}} images have a side under {settings.min_side} pixels ({{examples}})",
            examples["side"] < settings.min_side,
        ),
        Rule(
            "rows_per_class",
            "critical",
            "classes",
            between(column="total", min_value=settings.min_per_class),
            f"{{count}} classes have fewer than {settings.min_per_class} usable images ({{examples}}); add images or remove the class folders",
            classes["total"] < settings.min_per_class,
        ),
        Rule(
            "train_has_every_class",
            "critical",
            "classes",
            between(column="train", min_value=1),
            "{count} classes have no training image ({examples}); add some to each",
            classes["train"] < 1,
        ),
        Rule(
            "val_has_every_class",
            "warning",
            "classes",
            between(column="val", min_value=1),
            "{count} classes have no validation image ({examples}): the choice of model does not see them",
            classes["val"] < 1,
        ),
        Rule(
            "test_has_every_class",
            "warning",
            "classes",
            between(column="test", min_value=1),
            "{count} classes have no test image ({examples}): the result says nothing of them",
            classes["test"] < 1,
        ),
        *(
            Rule(
                f"{split}_not_empty",
                "critical",
                "classes",
                gxe.ExpectColumnSumToBeBetween(column=split, min_value=1),
                f"the {split} split is empty; give more images"
                + ("" if split == "train" else f", or raise {split}_fraction"),
            )
            for split in SPLITS
        ),
    ]


def run_great_expectations(frames: dict[str, pd.DataFrame], rules: list[Rule]) -> dict[str, tuple[bool, str]]:
    """Validate ``rules``; return {rule: (passed, what it raised)}. Results are matched by name, not by order."""
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    logging.getLogger("great_expectations").setLevel(logging.ERROR)
    import great_expectations as gx

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    source = context.data_sources.add_pandas("graftwork")
    found: dict[str, tuple[bool, str]] = {}
    for table, frame in frames.items():
        mine = [rule for rule in rules if rule.table == table]
        for rule in mine:
            rule.expectation.meta = {"rule": rule.name}
            rule.expectation.severity = rule.severity
        batch = (
            source.add_dataframe_asset(table)
            .add_batch_definition_whole_dataframe("all")
            .get_batch({"dataframe": frame})
        )
        result = batch.validate(gx.ExpectationSuite(name=table, expectations=[rule.expectation for rule in mine]))
        for each in result.results:
            raised = "; ".join(messages(each.exception_info))
            found[each.expectation_config.meta["rule"]] = (bool(each.success) and not raised, raised)
    return {rule.name: found.get(rule.name, (False, "Great Expectations gave no result")) for rule in rules}


def messages(exception_info: Any) -> Iterator[str]:
    """Yield the messages in an ``exception_info``: a dict with ``raised_exception``, or a dict of such dicts."""
    if isinstance(exception_info, dict):
        if exception_info.get("raised_exception") is True:
            yield str(exception_info.get("exception_message", "raised"))
        for value in exception_info.values():
            yield from messages(value)
