"""Validation: a Great Expectations suite over the manifest, with a severity a rule, and a page of our own.

What a rule needs is first computed as a column, then expected of: the columns are plain NumPy and pandas, the judging is Great Expectations'.
A YAML file may change any rule and add expectations (``graftwork.suite``).
"""

import logging
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from graftwork import drift, suite
from graftwork.dataset import SPLITS, Dataset
from graftwork.errors import one_line
from graftwork.modality import looks, name_of
from graftwork.report import render_validation
from graftwork.settings import ValidateSettings

EXAMPLES = 5  # named in a finding's message
PICTURES = 12  # shown on the page, of each finding
Progress = Callable[[int, int], None]
Index = npt.NDArray[np.int64]


class Rule(NamedTuple):
    """One expectation on one table, and how to say that it failed."""

    name: str
    severity: str  # "critical" or "warning"
    table: str  # "examples", "classes" or "dataset"
    expectation: Any
    failed: str  # what is wrong and what to do; {count} and {examples} are filled in
    bad: Index | None = None  # the rows that break the rule, those to look at first in front
    partner: Index | None = None  # a row beside each of ``bad``: its duplicate


class Validation(NamedTuple):
    summary: dict[str, Any]  # JSON-ready: rules with their results, counts
    html: str
    critical: list[str]
    warnings: list[str]


class Tables(NamedTuple):
    """What the rules look at, with a column for whatever a rule needs."""

    examples: pd.DataFrame  # a row an example, in the manifest's order, broken ones after them
    classes: pd.DataFrame  # a row a class
    dataset: pd.DataFrame  # one row
    duplicates: "Duplicates"


class Duplicates(NamedTuple):
    """Rows that lie beside another one of theirs, and that one: of equal contents, and of nearly equal pictures."""

    across_splits: tuple[Index, Index]
    across_labels: tuple[Index, Index]
    near: tuple[Index, Index]


def validate(dataset: Dataset, settings: ValidateSettings, reference: dict[str, Any] | None = None) -> Validation:
    """Judge ``dataset`` by the suite. An expectation that raises counts as a critical failure: it proved nothing.

    ``reference`` is the profile (``graftwork.drift``) of the data that the champion was trained on; without it, nothing is said of drift.

    Raises:
        UserError: ``settings.suite`` is no suite.
    """
    elsewhere = reference is not None and name_of(reference) != name_of(dataset.info)
    reference = None if elsewhere else reference
    changes = suite.parse_suite(settings.suite)
    settings = suite.with_settings(settings, changes)
    data = tables(dataset, settings, reference)
    rules = suite.with_severities(standard_rules(data, dataset, settings, reference), changes)
    frames = {"examples": data.examples, "classes": data.classes, "dataset": data.dataset}
    rules += suite.own_rules(changes, frames, Rule, [rule.name for rule in rules])
    outcomes = run_great_expectations(frames, rules)
    results, pictures = [], {}
    for rule in rules:
        outcome = outcomes[rule.name]
        bad = rule.bad if rule.bad is not None else np.empty(0, np.int64)
        if rule.bad is not None:
            shown, count = (
                shown_of(rule, frames[rule.table]["source" if rule.table == "examples" else "label"]),
                len(bad),
            )
        else:
            # A rule on the whole has nothing to count.
            count, shown = (0, []) if rule.table == "dataset" else (outcome.unexpected, outcome.values)
        told = shown
        if rule.name in ("decodable", "all_decodable"):  # rows of broken images alone, which come after the others
            reasons = [dataset.info["broken"][n - len(dataset.manifest)]["reason"] for n in bad[:EXAMPLES]]
            told = [f"{name}: {reason}" for name, reason in zip(shown, reasons, strict=True)]
        text = in_number(rule.failed.format(count=f"{count:,}", examples=", ".join(told)))
        message = (
            f"{rule.name}: could not be checked ({one_line(outcome.raised)})"
            if outcome.raised
            else f"{rule.name}: {text}"
        )
        results.append(
            {
                "rule": rule.name,
                "severity": "critical" if outcome.raised else rule.severity,
                "passed": outcome.passed,
                "count": 0 if outcome.passed else count,
                "examples": [] if outcome.passed else shown,
                "message": "" if outcome.passed else message,
            }
        )
        if not outcome.passed and rule.table == "examples" and len(bad):
            pictures[rule.name] = cards(dataset, data.examples, bad[:PICTURES], rule.partner)
    size = looks(dataset.info).SIZE[0]
    failed = [r for r in results if not r["passed"]]
    critical = [str(r["message"]) for r in failed if r["severity"] == "critical"]
    warnings = [str(r["message"]) for r in failed if r["severity"] == "warning"]
    if elsewhere:
        warnings.append(
            "drift: is not judged, since the champion was trained on data of another kind; register under another name"
        )
    summary = {
        "dataset": dataset.info["name"],
        "source": dataset.info.get("source", ""),
        "digest": dataset.digest,
        "passed": not critical,
        "counts": {
            "rules": len(rules),
            "critical": len(critical),
            "warnings": len(warnings),
            "broken": len(dataset.info["broken"]),
            "near_duplicates": len(data.duplicates.near[0]),
        },
        "rules": results,
        "broken": dataset.info["broken"][:200],
        "skipped": dataset.info["skipped"],
        "classes": dataset.info["counts"],
        "reference": {k: reference[k] for k in ("champion", "digest") if k in reference} if reference else None,
        "modality": name_of(dataset.info),
        "sizes": drift.histogram(data.examples[size].dropna().to_numpy(np.float64), looks(dataset.info).EDGES[size]),
    }
    return Validation(summary, render_validation(summary, pictures), critical, warnings)


def in_number(text: str) -> str:
    """Return a message that begins with a count, with the words that one wants after it: "1 image is"."""
    one = re.match(r"1 (image|text|classe|example)s (are|have|look|cannot)\b", text)
    if not one:
        return text
    noun, verb = one.groups()
    said = {"are": "is", "have": "has", "look": "looks"}.get(verb, verb)
    return f"1 {noun.removesuffix('e') if noun == 'classe' else noun} {said}{text[one.end() :].replace(' and are left', ' and is left', 1)}"


def shown_of(rule: Rule, names: "pd.Series[Any]") -> list[str]:
    """Return the names of the first rows that break the rule; of two that lie beside each other, once."""
    if rule.bad is None or rule.partner is None:
        return [one_line(names.iloc[n], 80) for n in (rule.bad if rule.bad is not None else [])[:EXAMPLES]]
    pairs = dict.fromkeys(
        (min(n, m), max(n, m)) for n, m in zip(rule.bad[: 4 * EXAMPLES], rule.partner[: 4 * EXAMPLES], strict=True)
    )
    return [f"{one_line(names.iloc[n], 80)} = {one_line(names.iloc[m], 80)}" for n, m in list(pairs)[:EXAMPLES]]


def tables(dataset: Dataset, settings: ValidateSettings, reference: dict[str, Any] | None) -> Tables:
    """Compute every column that a rule looks at."""
    rows = dataset.manifest
    split, label, content = (codes(rows[name].to_pandas()) for name in ("split", "label", "sha256"))
    own = looks(dataset.info)
    good = rows.select(["source", "label", "split", "group", "width", "height", "mode"]).to_pandas()
    good = pd.concat([good, own.columns(dataset, rows)], axis=1)
    good["decodable"] = True
    good["splits_with_this_content"] = distinct_within(content, split)
    good["labels_with_this_content"] = distinct_within(content, label)
    grouped = (good["group"] != "").to_numpy()
    good["splits_with_this_group"] = 1
    if grouped.any():
        good.loc[grouped, "splits_with_this_group"] = distinct_within(codes(good["group"][grouped]), split[grouped])
    near = own.near_duplicates(dataset, split, content) if settings.near_duplicates else (np.empty(0, np.int64),) * 2
    good["near_duplicates_in_other_splits"] = np.bincount(near[0], minlength=len(good))
    broken = pd.DataFrame(dataset.info["broken"], columns=["source", "label", "reason"]).assign(decodable=False)
    broken["label"] = broken["label"].where(broken["label"] != "")  # missing, which is not outside the class list
    examples = pd.concat([good, broken.drop(columns="reason")], ignore_index=True) if len(broken) else good
    counts = dataset.info["counts"]
    classes = pd.DataFrame(
        {"label": dataset.classes, **{split: [counts[split][c] for c in dataset.classes] for split in SPLITS}}
    )
    classes["total"] = classes[list(SPLITS)].sum(axis=1)
    trained = classes["train"][classes["train"] > 0]
    whole: dict[str, float] = {"imbalance": float(trained.max() / trained.min()) if len(trained) else 1.0}
    if reference:
        whole |= {f"drift_{k}": v for k, v in drift.compare(drift.profile(dataset), reference).items()}
    duplicates = Duplicates(
        pairs_within(content, split, good["splits_with_this_content"].to_numpy() > 1),
        pairs_within(content, label, good["labels_with_this_content"].to_numpy() > 1),
        near,
    )
    return Tables(examples, classes, pd.DataFrame([whole]), duplicates)


def codes(values: "pd.Series[Any]") -> npt.NDArray[np.int64]:
    """Return a number for every value: equal values, equal numbers, from 0 on."""
    return np.asarray(pd.factorize(values)[0], dtype=np.int64)


def distinct_within(group: npt.NDArray[np.int64], value: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return, for every row, how many distinct ``value`` there are among the rows of its ``group``."""
    if not len(group):
        return np.empty(0, np.int64)
    pairs = np.unique(group * (value.max() + 2) + value + 1)
    return np.bincount(pairs // (value.max() + 2), minlength=group.max() + 1)[group]


def pairs_within(
    group: npt.NDArray[np.int64], value: npt.NDArray[np.int64], chosen: npt.NDArray[np.bool_]
) -> tuple[Index, Index]:
    """Return the rows that are ``chosen``, and for each one a row of the same group with another value."""
    rows = np.flatnonzero(chosen)
    if not len(rows):
        return rows, rows
    order = rows[np.lexsort((value[rows], group[rows]))]
    starts = np.flatnonzero(np.r_[True, np.diff(group[order]) != 0])
    first = np.repeat(order[starts], np.diff(np.r_[starts, len(order)]))
    last = np.repeat(order[np.r_[starts[1:], len(order)] - 1], np.diff(np.r_[starts, len(order)]))
    partner = np.where(value[order] == value[first], last, first)
    back = np.argsort(order)
    return rows, partner[back]


def standard_rules(
    data: Tables, dataset: Dataset, settings: ValidateSettings, reference: dict[str, Any] | None
) -> list[Rule]:
    """Return the suite as it is where nobody changed it."""
    import great_expectations.expectations as gxe

    examples, classes = data.examples, data.classes
    own = looks(dataset.info)
    nouns = f"{own.NOUN}s"
    broken = ~examples["decodable"].astype(bool)
    between = gxe.ExpectColumnValuesToBeBetween
    in_set = gxe.ExpectColumnValuesToBeInSet

    def rows(mask: "pd.Series[bool]", by: str = "", descending: bool = False) -> Index:
        found = np.flatnonzero(mask.to_numpy(dtype=bool, na_value=False))
        if by:
            order = np.argsort(examples[by].to_numpy()[found], kind="stable")
            found = found[order[::-1] if descending else order]
        return found

    rules = [
        Rule(
            "decodable",
            "critical",
            "examples",
            in_set(column="decodable", value_set=[True], mostly=round(1 - settings.max_broken, 9)),
            f"{{count}} of {len(examples):,} {nouns} cannot be decoded, more than the {settings.max_broken:.0%} allowed "
            "({examples}); mend or remove them, or raise max_broken",
            rows(broken),
        ),
        Rule(
            "all_decodable",
            "warning",
            "examples",
            in_set(column="decodable", value_set=[True]),
            f"{{count}} {nouns} cannot be decoded and are left out ({{examples}})",
            rows(broken),
        ),
        Rule(
            "label_set",
            "critical",
            "examples",
            in_set(column="label", value_set=settings.classes or dataset.classes),
            "{count} examples have a label outside the class list ({examples}); "
            + ("correct the labels, or the setting classes" if settings.classes else "run ingest_data again"),
            rows(examples["label"].notna() & ~examples["label"].isin(settings.classes or dataset.classes)),
        ),
        Rule(
            "content_in_one_split",
            "critical",
            "examples",
            between(column="splits_with_this_content", max_value=1),
            f"{{count}} {nouns} are in more than one split ({{examples}}): the test would be of what was learned; keep each in one split",
            *data.duplicates.across_splits,
        ),
        Rule(
            "content_has_one_label",
            "warning",
            "examples",
            between(column="labels_with_this_content", max_value=1),
            f"{{count}} {nouns} have the same content as another with another label ({{examples}}); decide which label is right",
            *data.duplicates.across_labels,
        ),
        Rule(
            "group_in_one_split",
            "critical",
            "examples",
            between(column="splits_with_this_group", max_value=1),
            f"{{count}} {nouns} are of a group that is in more than one split ({{examples}}): the test would be of what was learned; "
            "keep each group in one split",
            rows(examples["splits_with_this_group"] > 1),
        ),
        *own.rules(examples, settings, Rule, rows),
        Rule(
            "rows_per_class",
            "critical",
            "classes",
            between(column="total", min_value=settings.min_per_class),
            f"{{count}} classes have fewer than {settings.min_per_class} usable {nouns} ({{examples}}); add {nouns} or remove the class folders",
            np.flatnonzero(classes["total"] < settings.min_per_class),
        ),
        Rule(
            "train_has_every_class",
            "critical",
            "classes",
            between(column="train", min_value=1),
            f"{{count}} classes have no training {own.NOUN} ({{examples}}); add some to each",
            np.flatnonzero(classes["train"] < 1),
        ),
        Rule(
            "val_has_every_class",
            "warning",
            "classes",
            between(column="val", min_value=1),
            f"{{count}} classes have no validation {own.NOUN} ({{examples}}): the choice of model does not see them",
            np.flatnonzero(classes["val"] < 1),
        ),
        Rule(
            "test_has_every_class",
            "warning",
            "classes",
            between(column="test", min_value=1),
            f"{{count}} classes have no test {own.NOUN} ({{examples}}): the result says nothing of them",
            np.flatnonzero(classes["test"] < 1),
        ),
        *(
            Rule(
                f"{split}_not_empty",
                "critical",
                "classes",
                gxe.ExpectColumnSumToBeBetween(column=split, min_value=1),
                f"the {split} split is empty; give more {nouns}"
                + ("" if split == "train" else f", or raise {split}_fraction"),
            )
            for split in SPLITS
        ),
        Rule(
            "balance",
            "warning",
            "dataset",
            between(column="imbalance", max_value=settings.max_imbalance),
            f"the largest class has {data.dataset['imbalance'][0]:.0f} times the training {nouns} of the smallest; "
            "add to the small ones, or judge by --set metric=macro_f1, which balances training",
        ),
    ]
    if settings.near_duplicates:
        rules.insert(
            4,
            Rule(
                "near_duplicates_across_splits",
                "warning",
                "examples",
                between(column="near_duplicates_in_other_splits", max_value=0),
                f"{{count}} {nouns} {own.NEAR} ({{examples}}): the test would be of what was "
                "learned; keep such pairs in one split, by a group column or by hand",
                *data.duplicates.near,
            ),
        )
    if settings.classes:
        missing = sorted(set(settings.classes) - set(dataset.classes))
        rules.append(
            Rule(
                "classes_present",
                "critical",
                "classes",
                gxe.ExpectColumnDistinctValuesToContainSet(column="label", value_set=settings.classes),
                f"there is no {own.NOUN} of {literal(', '.join(missing[:EXAMPLES]))}; add some, or correct the setting classes",
            )
        )
    if reference:
        rules += drift_rules(data, dataset, settings, reference)
    return rules


def literal(text: str) -> str:
    """Return ``text``, which came from outside, as a part of a message that is formatted later."""
    return one_line(text, 200).replace("{", "{{").replace("}", "}}")


def drift_rules(data: Tables, dataset: Dataset, settings: ValidateSettings, reference: dict[str, Any]) -> list[Rule]:
    """Compare with the data that the champion was trained on."""
    import great_expectations.expectations as gxe

    theirs = sorted(reference["classes"])
    gone, new = sorted(set(theirs) - set(dataset.classes)), sorted(set(dataset.classes) - set(theirs))
    change = literal(", ".join([f"-{c}" for c in gone[:EXAMPLES]] + [f"+{c}" for c in new[:EXAMPLES]]))
    who = literal(reference.get("champion", "the reference"))
    means = {"class_shares": "shares of the classes", **looks(dataset.info).MEASURES}
    return [
        Rule(
            "label_set_as_before",
            "warning",
            "classes",
            gxe.ExpectColumnDistinctValuesToEqualSet(column="label", value_set=theirs),
            f"the classes are not those of {who} ({change}); the two models cannot be compared",
        ),
        *(
            Rule(
                f"drift_{name}",
                "warning",
                "dataset",
                gxe.ExpectColumnValuesToBeBetween(column=f"drift_{name}", max_value=settings.max_drift),
                f"the {meaning} have shifted since {who} was trained (stability index "
                f"{data.dataset[f'drift_{name}'][0]:.2f}, over {settings.max_drift:g}); see that this is meant",
            )
            for name, meaning in means.items()
        ),
    ]


class Outcome(NamedTuple):
    """What Great Expectations found of one rule."""

    passed: bool
    raised: str  # what it raised: nothing was proved
    unexpected: int = 0
    values: list[str] = []  # some that broke the rule  # noqa: RUF012


def run_great_expectations(frames: dict[str, pd.DataFrame], rules: list[Rule]) -> dict[str, Outcome]:
    """Validate ``rules``; return the outcome of each. Results are matched by name, not by order."""
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    logging.getLogger("great_expectations").setLevel(logging.ERROR)
    import great_expectations as gx

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    source = context.data_sources.add_pandas("graftwork")
    found: dict[str, Outcome] = {}
    for table, frame in frames.items():
        mine = [rule for rule in rules if rule.table == table]
        if not mine:
            continue
        for rule in mine:
            rule.expectation.meta = {"rule": rule.name}
        batch = (
            source.add_dataframe_asset(table)
            .add_batch_definition_whole_dataframe("all")
            .get_batch({"dataframe": frame})
        )
        result = batch.validate(gx.ExpectationSuite(name=table, expectations=[rule.expectation for rule in mine]))
        for each in result.results:
            raised = "; ".join(messages(each.exception_info))
            some = [one_line(v, 80) for v in (each.result or {}).get("partial_unexpected_list", [])[:EXAMPLES]]
            count = int((each.result or {}).get("unexpected_count", 0) or 0)
            name = each.expectation_config.meta["rule"]
            found[name] = Outcome(bool(each.success) and not raised, raised, count, some)
    return {rule.name: found.get(rule.name, Outcome(False, "Great Expectations gave no result")) for rule in rules}


def messages(exception_info: Any) -> Iterator[str]:
    """Yield the messages in an ``exception_info``: a dict with ``raised_exception``, or a dict of such dicts."""
    if isinstance(exception_info, dict):
        if exception_info.get("raised_exception") is True:
            yield str(exception_info.get("exception_message", "raised"))
        for value in exception_info.values():
            yield from messages(value)


# ---- cards ---------------------------------------------------------------------------------------------------------------------


def cards(dataset: Dataset, examples: pd.DataFrame, rows: Index, partner: Index | None) -> list[list[dict[str, str]]]:
    """Return what the page shows of ``rows``: a card each, of one example, or of two where each row has a partner."""
    own = looks(dataset.info)
    pairs = [[n] for n in rows] if partner is None else [[n, m] for n, m in zip(rows, partner, strict=False)]
    shown: list[list[dict[str, str]]] = []
    seen: set[frozenset[int]] = set()
    for pair in pairs:
        if frozenset(map(int, pair)) in seen:  # b beside a, after a beside b
            continue
        seen.add(frozenset(map(int, pair)))
        card = []
        for n in map(int, pair):
            row = examples.iloc[n]
            label, split = (row[k] if isinstance(row[k], str) else "" for k in ("label", "split"))
            card.append(
                {
                    "source": one_line(row["source"], 200),
                    "label": one_line(label, 60),
                    "split": split,
                    **(own.card(dataset, n) if n < len(dataset.manifest) else {}),
                }
            )
        shown.append(card)
    return shown
