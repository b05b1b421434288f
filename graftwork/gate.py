"""The gate: whether a challenger becomes champion, by a policy that is a YAML text. ``docs/policy.md`` shows every rule.

A better figure is no proof: of two models that are equally good, one is ahead on any test set. So the champion is beaten only if chance explains
it badly, by McNemar's exact test or a paired bootstrap on the same examples. Whoever asks many times promotes by luck in the end all the same:
a test set that has decided often has to be renewed.
"""

import difflib
import math
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from graftwork.errors import UserError, one_line
from graftwork.metrics import FEW, LOWER_IS_BETTER, compare, measure_one
from graftwork.settings import EvaluateSettings, Settings, parse

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Rule = dict[str, Any]  # {"rule", "passed": bool | None, "figures", "reason"}; None: not applied
Metric = Literal[
    "accuracy",
    "balanced_accuracy",
    "macro_precision",
    "macro_recall",
    "macro_f1",
    "top_k_accuracy",
    "log_loss",
    "auroc",
    "average_precision",
    "ece",
]
WORDS = {
    "macro_f1": "macro F1",
    "top_k_accuracy": "top-k accuracy",
    "auroc": "AUROC",
    "ece": "calibration error (ECE)",
}
# Given as they are, and not in percent.
PLAIN = ("log_loss", "auroc", "average_precision")
# 0.87 - 0.84 is more than 0.03 in floating point, and is not.
ROUNDING = 1e-9


def plain(value: object) -> object:
    """Return a number or "none" as YAML gives it: truth values are no numbers, though Python takes them for some."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return None if value == "none" else value


Number = Annotated[float, BeforeValidator(plain)]
MaybeNumber = Annotated[float | None, BeforeValidator(plain)]
MaybeCount = Annotated[int | None, BeforeValidator(plain)]


class BaselinePolicy(Settings):
    """What is asked of a challenger against the baseline of its own run."""

    by: Literal["margin", "confidence"] = Field(
        default="margin",
        description="margin: the figure alone is compared; confidence: it must be proved, as for the champion",
    )
    margin: Number = Field(
        default=0.0, ge=0, description="by how much more the challenger must be better, in the metric's unit"
    )
    confidence: Number = Field(default=0.95, gt=0.5, lt=1, description="how sure one must be, with by: confidence")


class ChampionPolicy(Settings):
    """What is asked of a challenger against the champion, on the same test examples."""

    by: Literal["confidence", "margin", "not-worse"] = Field(
        default="confidence",
        description="confidence: proved better by more than margin; margin: better by more than margin in the figure alone;"
        " not-worse: proved not to be worse by margin or more",
    )
    margin: Number = Field(default=0.0, ge=0, description="in the metric's unit: 0.01 is one point of accuracy")
    confidence: Number = Field(
        default=0.95, gt=0.5, lt=1, description="how sure one must be, with by: confidence or not-worse"
    )

    @model_validator(mode="after")
    def margin_of_not_worse(self) -> "ChampionPolicy":
        if self.by == "not-worse" and not self.margin:
            raise ValueError(
                "margin: by: not-worse needs one above 0, 0.01 say: that two models are equal is never proved"
            )
        return self


class Policy(Settings):
    """What a challenger must show to become champion."""

    metric: Metric = Field("accuracy", description="of the test examples; what floor, baseline and champion are about")
    floor: MaybeNumber = Field(
        None, ge=0, description="least value of the metric; for log_loss and ece the largest; none: any"
    )
    worst_class_recall: Number = Field(
        0.0,
        ge=0,
        le=1,
        description="least recall of the class that has the lowest, of those with test examples; 0: any",
    )
    baseline: BaselinePolicy = Field(BaselinePolicy(), description="what is asked against the baseline")
    champion: ChampionPolicy = Field(ChampionPolicy(), description="what is asked against the champion")
    max_ece: MaybeNumber = Field(
        0.1, ge=0, le=1, description="largest calibration error, by the lower end of its interval; none: any"
    )
    max_warnings: MaybeCount = Field(None, ge=0, description="most warnings of data validation; none: any")
    max_latency_ms: MaybeNumber = Field(None, gt=0, description="most milliseconds for one example (median); none: any")
    max_size_mb: MaybeNumber = Field(None, gt=0, description="largest weights, in megabytes; none: any")

    @model_validator(mode="after")
    def shares(self) -> "Policy":
        if self.metric != "log_loss":
            margins = (("baseline.margin", self.baseline.margin), ("champion.margin", self.champion.margin))
            for name, value in (("floor", self.floor), *margins):
                if value is not None and value > 1:
                    raise ValueError(f"{name}: {self.metric} is a share, from 0 to 1; write 0.9 for 90%")
        return self


class ChampionEvidence(NamedTuple):
    version: str
    probabilities: Floats | None  # (N, C), on the challenger's test examples; None where there is a problem
    problem: str = ""  # why it cannot be compared


class Evidence(NamedTuple):
    """What was measured of a challenger; the gate measures nothing but differences."""

    candidate: str  # baseline, fine_tuned or scratch
    targets: Ints  # (N,)
    probabilities: Floats  # (N, C)
    score: dict[str, Any]  # of graftwork.metrics
    baseline: Floats | None  # (N, C); None where the challenger is the baseline, or there is none
    champion: ChampionEvidence | None
    validation: dict[str, Any] | None  # {"critical": n, "warnings": n}
    size_mb: float
    latency_ms: float | None  # of one example, median
    rolled_back: bool = False  # `graftwork rollback` took these very weights out of service


def parse_policy(text: str) -> Policy:
    """Read a policy; what it does not say, and an empty text, is at its default.

    Raises:
        UserError: it is no YAML, or a key or a value is none of a policy's.
    """
    import yaml

    try:
        keys_once(yaml.compose(text, Loader=yaml.SafeLoader))
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that there is not
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise UserError(
            f"policy: {where}{one_line(getattr(error, 'problem', None) or error, 160)}; write YAML"
        ) from None
    found = {} if found is None else found
    if not isinstance(found, dict):
        raise UserError(f"policy: is a {type(found).__name__}; write a mapping of {', '.join(Policy.model_fields)}")
    # A section whose lines are all commented out.
    given = {
        str(key): value for key, value in found.items() if value is not None or key not in ("baseline", "champion")
    }
    try:
        return Policy(**given)
    except ValidationError as error:
        raise UserError(f"policy: {mistake(error)}") from None


def keys_once(node: Any) -> None:
    """Raise UserError if a key of the policy, or of a section, is there twice: YAML's reader would keep the last, silently."""
    sections = (
        [("", node), *((f"{k.value}.", v) for k, v in node.value)] if node is not None and node.id == "mapping" else []
    )
    for prefix, section in sections:
        if section.id != "mapping":
            continue
        lines: dict[Any, int] = {}
        for key, _ in section.value:
            line = key.start_mark.line + 1
            if key.id == "scalar" and key.value in lines:
                raise UserError(
                    f"policy: {prefix}{one_line(key.value, 60)}: is on line {lines[key.value]} and on line {line}; keep one"
                )
            if key.id == "scalar":
                lines[key.value] = line


def mistake(error: ValidationError) -> str:
    """Return the first mistake in one line: the key, its value and what it may be."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    model: Any = {"baseline": BaselinePolicy, "champion": ChampionPolicy}.get(path[0] if len(path) > 1 else "", Policy)
    name = one_line(".".join(path), 80)
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path[-1], model.model_fields, n=1)
        return f"{name}: is not known; {f'did you mean {near[0]}?' if near else 'it may have ' + ', '.join(model.model_fields)}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":  # of our own, which name the key
        return f"{name}.{message}" if name else message
    if first["type"] == "model_type":
        model = type(Policy.model_fields[path[0]].default)
        return f"{name}: write a mapping of {', '.join(model.model_fields)}"
    value = first["input"]
    shown = repr(value) if isinstance(value, str | int | float) else f"a {type(value).__name__}"
    field = model.model_fields.get(path[-1])
    meaning = f" ({field.description})" if field is not None and field.description else ""
    return f"{name} = {one_line(shown, 60)}: {message[0].lower()}{message[1:]}{meaning}"


def decide(policy: Policy, evidence: Evidence) -> dict[str, Any]:
    """Say whether the challenger becomes champion: {"promoted", "reasons", "rules", "policy"}, ready for JSON.

    It does if no rule fails. A rule is not applied (its "passed" is None) where the policy sets no bound or there is nothing to apply it to;
    a bound that is set, but whose figure is missing, fails: it is not shown to hold.

    Raises:
        UserError: there is no test example.
    """
    if not len(evidence.targets):
        raise UserError("test split: is empty, so nothing can be proved; add test examples or raise test_fraction")
    rules = [
        rule_rolled_back(evidence),
        *rules_validation(policy, evidence),
        rule_floor(policy, evidence),
        rule_worst_class(policy, evidence),
        rule_baseline(policy, evidence),
        rule_champion(policy, evidence),
        rule_ece(policy, evidence),
        rule_most("max_latency_ms", "one example takes", "ms", policy.max_latency_ms, evidence.latency_ms),
        rule_most("max_size_mb", "the weights are", "MB", policy.max_size_mb, evidence.size_mb),
    ]
    # What stopped it comes first; what was not asked for is told only where one would look for it.
    told = [r for r in rules if r["passed"] is not None or r["rule"] in ("baseline", "champion", "max_ece")]
    return {
        "promoted": all(r["passed"] is not False for r in rules),
        "reasons": [r["reason"] for r in sorted(told, key=lambda r: r["passed"] is not False)],
        "rules": rules,
        "policy": policy.model_dump(),
    }


def ruled(rule: str, passed: bool | None, reason: str, **figures: Any) -> Rule:
    return {"rule": rule, "passed": passed, "figures": figures, "reason": reason}


def rule_rolled_back(evidence: Evidence) -> Rule:
    if evidence.rolled_back:
        return ruled(
            "rolled_back",
            False,
            "these very weights were taken out of service by graftwork rollback; graftwork promote by hand brings them back",
        )
    return ruled("rolled_back", None, "these weights were not taken out of service before")


def rules_validation(policy: Policy, evidence: Evidence) -> list[Rule]:
    """Critical findings never pass; warnings do, up to ``max_warnings``."""
    found, bound = evidence.validation, policy.max_warnings
    if found is None:
        unknown = "there is no data validation to look at"
        limit = (
            "" if bound is None else f", so that the policy's at most {counted(bound, 'warning')} is not shown to hold"
        )
        return [
            ruled("validation", None, unknown),
            ruled("max_warnings", None if bound is None else False, unknown + limit, bound=bound),
        ]
    critical, warnings = int(found.get("critical", 0)), int(found.get("warnings", 0))
    verdict = f"data validation has {counted(critical, 'critical finding') if critical else 'no critical finding'}"
    rules = [ruled("validation", not critical, verdict, critical=critical)]
    said = f"data validation has {counted(warnings, 'warning')}"
    if bound is None:
        return [
            *rules,
            ruled("max_warnings", None, f"{said}; the policy allows any number", warnings=warnings, bound=None),
        ]
    within = warnings <= bound
    limit = f"{'within the' if within else 'more than the'} {bound:,} that the policy allows"
    return [*rules, ruled("max_warnings", within, f"{said}, {limit}", warnings=warnings, bound=bound)]


def rule_floor(policy: Policy, evidence: Evidence) -> Rule:
    metric, value, bound = policy.metric, evidence.score.get(policy.metric), policy.floor
    figures = {"metric": metric, "value": value, "bound": bound, "examples": len(evidence.targets)}
    if bound is None:
        return ruled("floor", None, f"the policy sets no floor of {words(metric)}", **figures)
    if value is None:
        return ruled("floor", False, f"{undefined(metric)}, so that the policy's floor is not shown to hold", **figures)
    lower = metric in LOWER_IS_BETTER
    passed = value <= bound + ROUNDING if lower else value >= bound - ROUNDING
    side = {(True, False): "not under", (False, False): "under", (True, True): "not above", (False, True): "above"}
    return ruled(
        "floor",
        passed,
        f"{has(evidence, value, metric)}, {side[passed, lower]} the policy's floor of {shown(metric, bound)}",
        **figures,
    )


def rule_worst_class(policy: Policy, evidence: Evidence) -> Rule:
    bound = policy.worst_class_recall
    known = [c for c in evidence.score.get("per_class", []) if c["examples"] and c["recall"] is not None]
    if not known:
        passed = False if bound else None
        return ruled("worst_class_recall", passed, "no class has a recall on these test examples", bound=bound)
    worst = min(known, key=lambda c: c["recall"])
    recall = float(worst["recall"])
    said = f"the class with the lowest recall is {one_line(worst['class'], 60)}, {recall:.2%} of {counted(worst['examples'], 'example')}"
    figures = {"class": worst["class"], "recall": recall, "examples": worst["examples"], "bound": bound}
    if not bound:
        return ruled("worst_class_recall", None, f"{said}; the policy sets no floor", **figures)
    passed = recall >= bound - ROUNDING
    limit = f"{'not under' if passed else 'under'} the policy's {bound:.2%}"
    return ruled("worst_class_recall", passed, f"{said}: {limit}", **figures)


def rule_baseline(policy: Policy, evidence: Evidence) -> Rule:
    metric, mine = policy.metric, evidence.score.get(policy.metric)
    said = undefined(metric) if mine is None else has(evidence, mine, metric)
    figures = {"metric": metric, "value": mine, "examples": len(evidence.targets)}
    if evidence.candidate == "baseline":
        return ruled("baseline", None, f"the baseline itself was chosen on validation: {said}", **figures)
    if evidence.baseline is None:
        return ruled("baseline", None, f"{said}; there is no baseline to compare it with", **figures)
    wanted = policy.baseline
    passed, found, proof = judged(metric, wanted.by, wanted.margin, wanted.confidence, evidence, evidence.baseline)
    if found["difference"] is None:
        return ruled(
            "baseline", False, f"{undefined(metric)}, so that nothing shows it better than the baseline", **found
        )
    reason = (
        f"{has(evidence, found['value'], metric)}, {relation(metric, found['difference'])} the baseline's"
        f" {shown(metric, found['theirs'])}"
    )
    if wanted.by == "confidence":
        reason += f" ({proof})" if passed else f", which is not enough ({proof})"
    elif wanted.margin or not passed:
        more = f"more than {points(metric, wanted.margin)}" if wanted.margin else "more"
        reason += f", and the policy asks for {more}" if passed else f"; the policy asks for {more}"
    return ruled("baseline", passed, reason, **found)


def rule_champion(policy: Policy, evidence: Evidence) -> Rule:
    champion, wanted, metric = evidence.champion, policy.champion, policy.metric
    if champion is None:
        return ruled("champion", None, "there was no champion before it")
    title = f"the champion, version {champion.version},"
    if champion.problem or champion.probabilities is None:
        problem = one_line(champion.problem, 200) or "it gave no predictions"
        return ruled(
            "champion",
            False,
            f"{title} cannot be compared ({problem}); if it is to be replaced, graftwork promote by hand",
            version=champion.version,
        )
    passed, found, proof = judged(metric, wanted.by, wanted.margin, wanted.confidence, evidence, champion.probabilities)
    found |= {"version": champion.version}
    if found["difference"] is None:
        return ruled("champion", False, f"{title} cannot be compared: {undefined(metric)}", **found)
    difference = found["difference"]
    if wanted.by == "not-worse":
        verdict = "not worse" if passed else "not shown to be matched"
        verdict += f": {evidence.candidate} has {relation(metric, difference)} it"
    elif passed:
        verdict = f"beaten by {points(metric, difference)}"
    elif difference > 0:
        verdict = f"not beaten: {evidence.candidate} is ahead by {points(metric, difference)}, which is not enough"
    elif difference < 0:
        verdict = f"not beaten: {evidence.candidate} is behind by {points(metric, -difference)}"
    else:
        verdict = f"not beaten: {evidence.candidate} has as much"
    reason = f"{title} has {shown(metric, found['theirs'])} {words(metric)} on the same {counted(len(evidence.targets), 'example')}"
    return ruled("champion", passed, f"{reason}: {verdict} ({proof})", **found)


def judged(
    metric: str, by: str, margin: float, confidence: float, evidence: Evidence, theirs: Floats
) -> tuple[bool, dict[str, Any], str]:
    """Compare the challenger with another model on the same examples; return whether it passes, the figures and how it was judged."""
    targets, mine = evidence.targets, evidence.probabilities
    values = [measure_one(metric, targets, p) for p in (mine, theirs)]
    found: dict[str, Any] = {
        "metric": metric,
        "value": values[0],
        "theirs": values[1],
        "difference": None,
        "margin": margin,
        "examples": len(targets),
    }
    if values[0] is None or values[1] is None:
        return False, found, ""
    found["difference"] = (values[1] - values[0]) if metric in LOWER_IS_BETTER else (values[0] - values[1])
    if by == "margin":
        asked = f"more than {points(metric, margin)}" if margin else "more"
        return found["difference"] > margin + ROUNDING, found | {"test": "point"}, f"the policy asks for {asked}"
    if metric == "accuracy" and by == "confidence" and not margin:
        only_mine, only_theirs, p = mcnemar(targets, mine, theirs)
        found |= {"test": "mcnemar", "only_mine_right": only_mine, "only_theirs_right": only_theirs, "p_better": p}
        found |= {"alpha": round(1 - confidence, 12)}
        passed = p < found["alpha"]
        return passed, found, f"McNemar p {figure(p)}" + ("" if passed else f", and not under {found['alpha']:.2g}")
    bound = -margin if by == "not-worse" else margin
    found |= {"test": "bootstrap", "confidence": confidence, "lower_bound": None}
    fewest = fewest_examples(metric, by, margin, confidence)
    if len(targets) < fewest:
        return False, found, f"{fewest:,} test examples are the fewest that can show it"
    lower = compare(targets, mine, theirs, parse(EvaluateSettings, {"confidence": confidence}), metric)["lower_bound"]
    if lower is None:
        return False, found, "a bootstrap gives no bound"
    passed = lower > bound + ROUNDING
    said = f"with {confidence * 100:g}% confidence better by more than {points(metric, lower)}"
    if lower < 0:
        said = f"with {confidence * 100:g}% confidence worse by less than {points(metric, -lower)}"
    limit = "" if passed and not margin else f", where the policy asks for {points(metric, margin)}"
    return passed, found | {"lower_bound": lower}, said + limit


def mcnemar(targets: Ints, mine: Floats, theirs: Floats) -> tuple[int, int, float]:
    """Return how many examples only the first model has right, how many only the second, and the one-sided p of McNemar's exact test.

    That is the chance of so many for the first, were both equally likely to be the one that is right (McNemar 1947).
    """
    from scipy.stats import binomtest

    right, other = mine.argmax(1) == targets, theirs.argmax(1) == targets
    only_mine, only_theirs = int((right & ~other).sum()), int((other & ~right).sum())
    if not only_mine + only_theirs:
        return 0, 0, 1.0
    return only_mine, only_theirs, float(binomtest(only_mine, only_mine + only_theirs, alternative="greater").pvalue)


def fewest_examples(metric: str, by: str, margin: float, confidence: float) -> int:
    """Return the fewest test examples that a bootstrap is believed on.

    Where no example shows a difference, a bootstrap's bound is 0 on any number of them; yet what happens to a share ``margin`` of all examples is
    missed by n examples with the chance (1 - margin)**n (the rule of three: Hanley and Lippman-Hand 1983, "If nothing goes wrong, is everything
    all right?").
    """
    if by != "not-worse" or metric == "log_loss" or margin >= 1:
        return FEW
    return max(FEW, math.ceil(math.log(1 - confidence) / math.log(1 - margin)))


def rule_ece(policy: Policy, evidence: Evidence) -> Rule:
    """Judge the calibration error by the lower end of its interval; a first model's is told, not judged."""
    value, interval, bound = evidence.score.get("ece"), evidence.score.get("ece_interval"), policy.max_ece
    figures = {"value": value, "interval": interval, "bound": bound}
    if value is None:
        passed = False if bound is not None and evidence.champion is not None else None
        return ruled("max_ece", passed, undefined("ece"), **figures)
    said = f"{words('ece')} is {value:.2%}"
    lower = min(value, interval[0]) if interval else value
    between = f" (interval {interval[0]:.2%} to {interval[1]:.2%})" if interval else ""
    if bound is None:
        return ruled("max_ece", None, f"{said}{between}; the policy sets no bound", **figures)
    passed = lower <= bound + ROUNDING
    limit = f"{'within' if passed else 'even its lower end is above'} the policy's {bound:.2%}"
    if evidence.champion is None:
        return ruled("max_ece", None, f"{said}{between}; a first model is not held to a bound", **figures)
    return ruled("max_ece", passed, f"{said}{between}: {limit}", **figures)


def rule_most(rule: str, said: str, unit: str, bound: float | None, value: float | None) -> Rule:
    figures = {"value": value, "bound": bound}
    name = {"ms": "latency", "MB": "size"}[unit]
    if value is None:
        if bound is None:
            return ruled(rule, None, f"the {name} was not measured, and the policy sets no bound", **figures)
        return ruled(
            rule,
            False,
            f"the {name} was not measured, so that the policy's {bound:,.1f} {unit} is not shown to hold",
            **figures,
        )
    said = f"{said} {value:,.1f} {unit}"
    if bound is None:
        return ruled(rule, None, f"{said}; the policy sets no bound", **figures)
    passed = value <= bound + ROUNDING
    return ruled(
        rule, passed, f"{said}, {'within' if passed else 'more than'} the policy's {bound:,.1f} {unit}", **figures
    )


def words(metric: str) -> str:
    return WORDS.get(metric, metric.replace("_", " "))


def undefined(metric: str) -> str:
    return f"{words(metric)} is undefined on these test examples"


def has(evidence: Evidence, value: float, metric: str) -> str:
    return f"{evidence.candidate} has {shown(metric, value)} {words(metric)} on {counted(len(evidence.targets), 'test example')}"


def shown(metric: str, value: float) -> str:
    return f"{value:.4f}" if metric in PLAIN else f"{value:.2%}"


def points(metric: str, difference: float) -> str:
    return f"{difference:.4f}" if metric in PLAIN else f"{100 * difference:.2f} points"


def relation(metric: str, difference: float) -> str:
    """Say how the challenger's figure stands to another: a positive difference is always better."""
    if difference == 0:
        return "as much as"
    more = (difference > 0) != (metric in LOWER_IS_BETTER)
    return f"{points(metric, abs(difference))} {'more' if more else 'less'} than"


def figure(p: float) -> str:
    return f"= {p:.2g}" if p >= 0.0001 else "< 0.0001"


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
