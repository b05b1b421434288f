"""The user's own suite: what it changes, what it adds, and the one line for each mistake in it."""

import pandas as pd
import pytest

from graftwork.errors import UserError
from graftwork.settings import ValidateSettings
from graftwork.suite import own_rules, parse_suite, with_settings, with_severities
from graftwork.validate import Rule, run_great_expectations

FRAMES = {
    "examples": pd.DataFrame({"width": [100, 200, 300], "label": ["a", "a", "b"]}),
    "classes": pd.DataFrame({"label": ["a", "b"], "train": [2, 1]}),
    "dataset": pd.DataFrame({"imbalance": [2.0]}),
}
RULES = [
    Rule(name, severity, "examples", None, "") for name, severity in (("size", "warning"), ("decodable", "critical"))
]


def test_no_suite_changes_nothing() -> None:
    """A user without a suite would have other rules than the documented ones."""
    for text in ("", "  \n", "# nothing yet\n"):
        assert with_settings(ValidateSettings(min_side=9), parse_suite(text)) == ValidateSettings(min_side=9)
        assert with_severities(RULES, parse_suite(text)) == RULES
        assert own_rules(parse_suite(text), FRAMES, Rule) == []


def test_bounds_and_severities_are_changed() -> None:
    """A user who knows her data better could not say so."""
    changes = parse_suite("settings: {min_side: 64}\nrules:\n  size: critical\n  decodable: off\n  drift_side: off\n")
    assert with_settings(ValidateSettings(min_side=9), changes).min_side == 64
    assert [(r.name, r.severity) for r in with_severities(RULES, changes)] == [("size", "critical")]


def test_own_expectations_are_judged_by_great_expectations() -> None:
    """A user's own rule would be read and never checked."""
    changes = parse_suite("""
expectations:
- {expect: ExpectColumnValuesToBeBetween, column: width, min_value: 150, severity: critical, name: wide, message: "too {narrow}"}
- {expect: expect_column_values_to_be_in_set, column: label, value_set: [a, b]}
- {expect: ExpectColumnMaxToBeBetween, table: dataset, column: imbalance, max_value: 1.5}
""")
    rules = own_rules(changes, FRAMES, Rule)
    outcomes = run_great_expectations(FRAMES, rules)
    assert [(r.name, r.severity, outcomes[r.name].passed) for r in rules] == [
        ("wide", "critical", False),
        ("expect_column_values_to_be_in_set_2", "warning", True),
        ("expect_column_max_to_be_between_3", "warning", False),
    ]
    assert outcomes["wide"].unexpected == 1 and outcomes["wide"].values == ["100"]
    assert rules[0].failed.format(count=1, examples="100") == "too {narrow} (1: 100)"


MISTAKES = {
    "expectations: [{expect: ExpectColumnToExist, column: width, name: size}]": "two rules have the name size",
    "expectations: [{expect: ExpectColumnToExist, column: width, table: [x]}]": "is none of examples, classes, dataset",
    "expectations: [{expect: ExpectColumnToExist, column: [width]}]": "examples has no column",
    "settings: {1: 2}": "setting 1",
    "settings: {reference: x}": "reference is not for a suite",
    "settings: {min_side: 2024-13-01}": "suite: ",
    "rules: [": "suite: line 1",
    "- a": "suite: list: is not known; a suite has settings, rules, expectations",
    "rule: {}": "suite: rule: is not known",
    "rules: [size]": "suite: rules: write a mapping",
    "expectations: {a: 1}": "suite: expectations: write a list",
    "rules: {size: severe}": "size: severity 'severe' is none of critical, warning, off",
    "rules: {seize: off}": "rule seize: there is none of that name; did you mean size",
    "settings: {min_sight: 3}": "setting min_sight",
    "settings: {min_side: -3}": "setting min_side = -3",
    "expectations: [size]": "expectation 1: write a mapping with 'expect:",
    "expectations: [{expect: ExpectTheSpanishInquisition}]": "Great Expectations has no ExpectTheSpanishInquisition",
    "expectations: [{expect: __import__}]": "Great Expectations has no __import__",
    "expectations: [{expect: ExpectColumnToExist, column: wight}]": "examples has no column 'wight'; it has width, label",
    "expectations: [{expect: ExpectColumnToExist, table: rows, column: a}]": "table 'rows' is none of examples, classes, dataset",
    "expectations: [{expect: ExpectColumnValuesToBeBetween, column: width, minimum: 3}]": "expectation 1: ExpectColumnValuesToBeBetween: ",
    "expectations: [{expect: ExpectColumnToExist, column: width, severity: bad}]": "severity 'bad'",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_gets_one_line_that_says_where(text: str) -> None:
    """A user would get a trace of pydantic's or YAML's, or a rule that is silently not there."""
    with pytest.raises(UserError) as raised:
        changes = parse_suite(text)
        with_settings(ValidateSettings(), changes)
        with_severities(RULES, changes)
        own_rules(changes, FRAMES, Rule, ["size", "decodable"])
    assert MISTAKES[text] in str(raised.value) and "\n" not in str(raised.value)


def test_yaml_runs_no_code() -> None:
    """A user who is given a suite would run whatever its author likes."""
    with pytest.raises(UserError, match="suite"):
        parse_suite("rules: !!python/object/apply:os.system [echo hello]")
