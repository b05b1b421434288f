"""The user's own suite: a YAML text that changes the standard rules, their bounds and severities, and adds expectations.

settings:                       # of the step, as --set takes them
  min_side: 64
rules:                          # standard rules, by name
  near_duplicates_across_splits: critical
  aspect: off
expectations:                   # any of Great Expectations', on a column of examples, classes or dataset
  - expect: ExpectColumnValuesToBeBetween
    column: width
    min_value: 128
    name: wide_enough
    severity: critical
    message: some images are too narrow for the camera they should come from
"""

import re
from collections.abc import Iterable
from typing import Any, TypeVar

import pandas as pd

from graftwork.errors import UserError, one_line
from graftwork.settings import ValidateSettings, parse

SEVERITIES = ("critical", "warning", "off")
PARTS = ("settings", "rules", "expectations")
OURS = ("expect", "name", "severity", "message", "table")
R = TypeVar("R")


def parse_suite(text: str) -> dict[str, Any]:
    """Read the suite; {} where ``text`` is empty.

    Raises:
        UserError: it is no YAML, or not of this form.
    """
    import yaml

    if not text.strip():
        return {}
    try:
        found = yaml.safe_load(text) or {}
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that there is not
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise UserError(
            f"suite: {where}{one_line(getattr(error, 'problem', None) or error, 160)}; write YAML"
        ) from None
    if not isinstance(found, dict) or set(found) - set(PARTS):
        odd = sorted(map(str, set(found) - set(PARTS))) if isinstance(found, dict) else [type(found).__name__]
        raise UserError(f"suite: {one_line(', '.join(odd), 80)}: is not known; a suite has {', '.join(PARTS)}")
    for part, kind in (("settings", dict), ("rules", dict), ("expectations", list)):
        if not isinstance(found.get(part) or kind(), kind):
            raise UserError(f"suite: {part}: write a {'list' if kind is list else 'mapping'}")
    # YAML 1.1 reads "off" as false.
    found["rules"] = {str(k): "off" if v is False else v for k, v in (found.get("rules") or {}).items()}
    for name, severity in found["rules"].items():
        check_severity(name, severity)
    return found


def check_severity(name: str, severity: object) -> str:
    if severity not in SEVERITIES:
        raise UserError(
            f"suite: {one_line(name, 60)}: severity {one_line(severity, 40)!r} is none of {', '.join(SEVERITIES)}"
        )
    return str(severity)


def with_settings(settings: ValidateSettings, changes: dict[str, Any]) -> ValidateSettings:
    """Return ``settings`` as the suite changes them."""
    changed = {str(name): value for name, value in (changes.get("settings") or {}).items()}
    for name in {"suite", "reference", "register_as"} & set(changed):
        raise UserError(f"suite: settings: {name} is not for a suite; give it with --set {name}=...")
    return parse(ValidateSettings, settings.model_dump() | {"suite": ""} | changed)


def with_severities(rules: list[Any], changes: dict[str, Any]) -> list[Any]:
    """Return the rules that are not off, with the severities that the suite gives them."""
    wanted = changes.get("rules") or {}
    names = {rule.name for rule in rules}
    # Rules that need a reference, or classes, are there only when these are.
    sometimes = re.compile(r"drift_\w+|label_set_as_before|classes_present|near_duplicates_across_splits")
    for name in wanted:
        if name not in names and not sometimes.fullmatch(name):
            import difflib

            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"rules: {', '.join(sorted(names))}"
            raise UserError(f"suite: rule {one_line(name, 60)}: there is none of that name; {hint}")
    return [
        rule._replace(severity=wanted.get(rule.name, rule.severity))
        for rule in rules
        if wanted.get(rule.name, rule.severity) != "off"
    ]


def own_rules(
    changes: dict[str, Any], frames: dict[str, pd.DataFrame], rule: type[R], taken: Iterable[str] = ()
) -> list[R]:
    """Return a rule for every expectation that the suite adds.

    Raises:
        UserError: Great Expectations has no such expectation, or refuses its arguments, or the table has no such column.
    """
    made = [own_rule(n, one, frames, rule) for n, one in enumerate(changes.get("expectations") or [], 1)]
    names = [*taken, *(str(getattr(one, "name", "")) for one in made)]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"suite: two rules have the name {one_line(name, 60)}; give each its own")
    return made


def own_rule(number: int, wanted: Any, frames: dict[str, pd.DataFrame], rule: type[R]) -> R:
    import great_expectations.expectations as gxe

    here = f"suite: expectation {number}"
    if not isinstance(wanted, dict) or not isinstance(wanted.get("expect"), str):
        raise UserError(f"{here}: write a mapping with 'expect: ExpectColumnValuesToBeBetween', say")
    arguments = {k: v for k, v in wanted.items() if k not in OURS}
    kind = "".join(part[:1].upper() + part[1:] for part in wanted["expect"].split("_"))
    made = getattr(gxe, kind, None) if kind.startswith("Expect") else None
    if made is None:
        raise UserError(f"{here}: Great Expectations has no {one_line(wanted['expect'], 60)}")
    table = wanted.get("table", "examples")
    if not isinstance(table, str) or table not in frames:
        raise UserError(f"{here}: table {one_line(table, 40)!r} is none of {', '.join(frames)}")
    for argument in ("column", "column_A", "column_B"):
        if argument in arguments and str(arguments[argument]) not in frames[table].columns:
            raise UserError(
                f"{here}: {table} has no column {one_line(arguments[argument], 40)!r}; it has {', '.join(map(str, frames[table].columns))}"
            )
    try:
        expectation = made(**{str(k): v for k, v in arguments.items()})
    except Exception as error:  # pydantic's, and Great Expectations' own
        raise UserError(f"{here}: {kind}: {one_line(reason(error), 160)}") from None
    name = str(wanted.get("name") or f"{re.sub('(?<!^)(?=[A-Z])', '_', kind).lower()}_{number}")
    severity = check_severity(name, wanted.get("severity", "warning"))
    message = str(wanted.get("message", f"{kind} does not hold")).replace("{", "{{").replace("}", "}}")
    return rule(name, severity, table, expectation, message + " ({count}: {examples})")  # type: ignore[call-arg]


def reason(error: Exception) -> str:
    errors = getattr(error, "errors", None)
    if callable(errors):
        first = errors()[0]
        return f"{'.'.join(map(str, first.get('loc', ())))}: {first.get('msg', error)}"
    return str(error)
