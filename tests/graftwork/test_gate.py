"""The gate: what becomes champion, and what is said of it."""

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from graftwork.errors import UserError
from graftwork.gate import ChampionEvidence, Evidence, Floats, Metric, decide, mcnemar, parse_policy
from graftwork.metrics import HEADLINES, score
from graftwork.settings import EvaluateSettings

IMAGES = 1000
TARGETS = np.arange(IMAGES) % 4
EXAMPLE = Path(__file__).parents[2] / "docs" / "policy.md"


def guesses(wrong: int, start: int = 0, images: int = IMAGES) -> Floats:
    """Return probabilities that are wrong for the images from ``start`` on, and right for all others."""
    targets = TARGETS[:images]
    labels = targets.copy()
    labels[start : start + wrong] = (targets[start : start + wrong] + 1) % 4
    return np.where(labels[:, None] == np.arange(4), 0.91, 0.03).astype(np.float32)


def champion(wrong: int, start: int = 0, images: int = IMAGES) -> ChampionEvidence:
    return ChampionEvidence("3", guesses(wrong, start, images), "")


def evidence(wrong: int = 100, images: int = IMAGES, **changes: Any) -> Evidence:
    """Return what is known of a challenger with 100 mistakes in 1,000, and with nothing to be compared with."""
    figures = {
        "accuracy": 1 - wrong / images,
        "log_loss": 0.4,
        "auroc": None,
        "ece": 0.05,
        "ece_interval": [0.04, 0.08],
        "per_class": [
            {"class": "cat", "examples": 250, "recall": 0.75},
            {"class": "dog", "examples": 750, "recall": 0.95},
            {"class": "eel", "examples": 0, "recall": None},
        ],
    }
    base = Evidence(
        candidate="fine_tuned",
        targets=TARGETS[:images],
        probabilities=guesses(wrong, images=images),
        score=figures | changes.pop("score", {}),
        baseline=None,
        champion=None,
        validation={"critical": 0, "warnings": 2},
        size_mb=13.5,
        latency_ms=20.0,
    )
    return base._replace(**changes)


def rule(name: str, text: str, given: Evidence) -> dict[str, Any]:
    decision = decide(parse_policy(text), given)
    found = next(r for r in decision["rules"] if r["rule"] == name)
    assert decision["promoted"] is (not any(r["passed"] is False for r in decision["rules"]))
    # Only one rule is at stake, and a failure is the first thing that is said.
    assert all(r["passed"] is not False for r in decision["rules"] if r["rule"] != name)
    if found["passed"] is False:
        assert decision["reasons"][0] == found["reason"]
    return found


AGAINST = {"champion": champion(300)}
BOUNDS = [
    ("floor", "floor: 0.9", {}, True),
    ("floor", "floor: 0.9001", {}, False),
    ("floor", "", {}, None),
    ("floor", "{metric: log_loss, floor: 0.4}", {}, True),
    ("floor", "{metric: log_loss, floor: 0.39}", {}, False),
    ("floor", "{metric: auroc, floor: 0.5}", {}, False),
    ("worst_class_recall", "worst_class_recall: 0.75", {}, True),
    ("worst_class_recall", "worst_class_recall: 0.76", {}, False),
    ("worst_class_recall", "", {}, None),
    ("worst_class_recall", "worst_class_recall: 0.1", {"score": {"per_class": []}}, False),
    ("validation", "", {}, True),
    ("validation", "", {"validation": {"critical": 1, "warnings": 0}}, False),
    ("validation", "", {"validation": None}, None),
    ("max_warnings", "max_warnings: 2", {}, True),
    ("max_warnings", "max_warnings: 1", {}, False),
    ("max_warnings", "", {}, None),
    ("max_warnings", "max_warnings: 1", {"validation": None}, False),
    ("max_latency_ms", "max_latency_ms: 20", {}, True),
    ("max_latency_ms", "max_latency_ms: 19.9", {}, False),
    ("max_latency_ms", "", {}, None),
    ("max_latency_ms", "max_latency_ms: 20", {"latency_ms": None}, False),
    ("max_latency_ms", "", {"latency_ms": None}, None),
    ("max_size_mb", "max_size_mb: 13.5", {}, True),
    ("max_size_mb", "max_size_mb: 13", {}, False),
    ("max_size_mb", "", {}, None),
    ("max_ece", "", AGAINST, True),
    ("max_ece", "max_ece: 0.04", AGAINST, True),
    ("max_ece", "max_ece: 0.039", AGAINST, False),
    ("max_ece", "max_ece: none", AGAINST, None),
    ("max_ece", "", AGAINST | {"score": {"ece": 0.12, "ece_interval": None}}, False),
    ("max_ece", "", AGAINST | {"score": {"ece": None}}, False),
    ("max_ece", "", {"score": {"ece": 0.5, "ece_interval": [0.4, 0.6]}}, None),
    ("rolled_back", "", {"rolled_back": True}, False),
    ("rolled_back", "", {}, None),
]


@pytest.mark.parametrize(("name", "text", "changes", "passed"), BOUNDS)
def test_bound(name: str, text: str, changes: dict[str, Any], passed: bool | None) -> None:
    """A bound that is off by one side, or holds where nothing was measured, promotes what the policy forbids."""
    assert rule(name, text, evidence(**dict(changes)))["passed"] is passed


BASELINES = [
    ("", 101, True),
    ("", 100, False),
    ("", 99, False),
    ("baseline: {margin: 0.01}", 110, False),  # one point is not more than one point
    ("baseline: {margin: 0.01}", 111, True),
    ("baseline: {by: confidence}", 104, False),
    ("baseline: {by: confidence}", 105, True),  # five for it and none against: p = 1/32
    ("baseline: {by: confidence, confidence: 0.99}", 105, False),
    ("baseline: {by: confidence, margin: 0.01}", 111, False),
    ("baseline: {by: confidence, margin: 0.01}", 140, True),
    ("metric: macro_f1", 101, True),
    ("metric: log_loss", 101, True),
    ("metric: log_loss", 99, False),
    ("metric: top_k_accuracy", 200, False),  # undefined with four classes
]


@pytest.mark.parametrize(("text", "wrong", "passed"), BASELINES)
def test_baseline(text: str, wrong: int, passed: bool) -> None:
    """Fine-tuning that gains nothing over a probe would go into service."""
    assert rule("baseline", text, evidence(baseline=guesses(wrong)))["passed"] is passed


CHAMPIONS = [
    ("", champion(104), False),
    ("", champion(105), True),
    ("", champion(100), False),
    ("", champion(100, 500), False),  # as many mistakes, others
    ("", champion(120, 500), False),  # ahead by two points, which chance explains
    ("", champion(150, 500), True),
    ("", champion(90), False),
    ("champion: {confidence: 0.99}", champion(105), False),
    ("champion: {by: margin}", champion(101), True),
    ("champion: {by: margin}", champion(100), False),
    ("champion: {by: margin, margin: 0.03}", champion(130), False),
    ("champion: {by: margin, margin: 0.03}", champion(131), True),
    ("champion: {margin: 0.02}", champion(125), False),
    ("champion: {margin: 0.02}", champion(140), True),
    ("champion: {by: not-worse, margin: 0.02}", champion(100), True),
    ("champion: {by: not-worse, margin: 0.02}", champion(95), True),
    ("champion: {by: not-worse, margin: 0.02}", champion(85), False),
    ("champion: {by: not-worse, margin: 0.02}", champion(100, 500), False),  # equal, but too unlike to be sure
    ("metric: macro_f1", champion(150), True),
    ("metric: macro_f1", champion(100), False),
    ("metric: log_loss", champion(150), True),
    ("metric: log_loss", champion(90), False),
    ("metric: top_k_accuracy", champion(300), False),
    ("", ChampionEvidence("3", None, "its classes are others: -cat"), False),
    ("champion: {by: margin}", ChampionEvidence("3", None, ""), False),
]


@pytest.mark.parametrize(("text", "against", "passed"), CHAMPIONS)
def test_champion(text: str, against: ChampionEvidence, passed: bool) -> None:
    """A challenger that was lucky on this test set, or that cannot be compared, would take the champion's place."""
    assert rule("champion", text, evidence(champion=against))["passed"] is passed


def test_few_images_prove_nothing_by_a_bootstrap() -> None:
    """Ten images without a difference would prove two models alike, and three with one that they are not."""
    alike = "champion: {by: not-worse, margin: 0.01}"
    assert rule("champion", alike, evidence(29, 298, champion=champion(29, 0, 298)))["passed"] is False
    assert rule("champion", alike, evidence(29, 299, champion=champion(29, 0, 299)))["passed"] is True
    few = rule("champion", "metric: macro_f1", evidence(0, 29, champion=champion(20, 0, 29)))
    assert few["passed"] is False and "30 test examples are the fewest" in few["reason"]
    assert rule("champion", "metric: macro_f1", evidence(0, 30, champion=champion(20, 0, 30)))["passed"] is True
    assert rule("champion", "", evidence(0, 1, champion=champion(1, 0, 1)))["passed"] is False


def test_first_model_needs_no_champion() -> None:
    """The first run of a project would never give a champion."""
    decision = decide(parse_policy(""), evidence(baseline=guesses(137)))
    assert decision["promoted"]
    assert decision["reasons"] == [
        "data validation has no critical finding",
        "fine_tuned has 90.00% accuracy on 1,000 test examples, 3.70 points more than the baseline's 86.30%",
        "there was no champion before it",
        "calibration error (ECE) is 5.00% (interval 4.00% to 8.00%); a first model is not held to a bound",
    ]
    assert not decide(parse_policy("floor: 0.95"), evidence(baseline=guesses(137)))["promoted"]
    assert not decide(parse_policy("max_size_mb: 1"), evidence())["promoted"]


def test_baseline_is_never_compared_with_itself() -> None:
    """A baseline that was chosen would fail to beat the baseline, and no run with it would give a champion."""
    decision = decide(parse_policy("baseline: {margin: 0.5}"), evidence(candidate="baseline", baseline=guesses(100)))
    assert decision["promoted"]
    reason = next(r for r in decision["rules"] if r["rule"] == "baseline")["reason"]
    assert reason == "the baseline itself was chosen on validation: baseline has 90.00% accuracy on 1,000 test examples"


REASONS = {
    "": (
        champion(150, 500),
        "the champion, version 3, has 85.00% accuracy on the same 1,000 examples: beaten by 5.00 points (McNemar p = 0.00094)",
    ),
    "champion: {confidence: 0.95}": (
        champion(120, 500),
        "the champion, version 3, has 88.00% accuracy on the same 1,000 examples: not beaten: fine_tuned is ahead by 2.00 points, "
        "which is not enough (McNemar p = 0.1, and not under 0.05)",
    ),
    "champion: {by: margin, margin: 0.03}": (
        champion(90),
        "the champion, version 3, has 91.00% accuracy on the same 1,000 examples: not beaten: fine_tuned is behind by 1.00 points "
        "(the policy asks for more than 3.00 points)",
    ),
    "champion: {by: margin}": (
        ChampionEvidence("3", None, "its classes are others:\n-cat"),
        "the champion, version 3, cannot be compared (its classes are others:\\n-cat); if it is to be replaced, graftwork promote by hand",
    ),
}


@pytest.mark.parametrize("text", REASONS)
def test_reasons_are_sentences_with_figures(text: str) -> None:
    """A verdict without its figures has to be believed."""
    against, said = REASONS[text]
    assert rule("champion", text, evidence(champion=against))["reason"] == said


def test_every_rule_says_one_line() -> None:
    """A reason is a line of a terminal, a tag in the registry and a row on the page."""
    for text, against in [(text, against) for text, against, _ in CHAMPIONS] + [("", None)]:
        given = evidence(champion=against, baseline=guesses(120), rolled_back=True)
        decision = json.loads(json.dumps(decide(parse_policy(text), given), allow_nan=False))
        assert len({r["rule"] for r in decision["rules"]}) == len(decision["rules"]) == 10
        assert all(r["reason"] and r["reason"].isprintable() and len(r["reason"]) < 400 for r in decision["rules"])
        assert not decision["promoted"] and "graftwork rollback" in decision["reasons"][0]


@pytest.mark.parametrize("metric", HEADLINES)
def test_every_metric_decides(metric: str) -> None:
    """A metric that the policy takes and the gate cannot use would stop a run at its last step."""
    generator = np.random.default_rng(0)
    targets = generator.integers(0, 6, 400)
    signal = (targets[:, None] == np.arange(6)) * 2.0
    good, bad = ((share * signal + generator.normal(0, 1, (400, 6))).astype(np.float32) for share in (2, 0.3))
    found = score(targets, good, list("abcdef"), EvaluateSettings(resamples=200))
    mine, theirs = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (good, bad))
    given = evidence(score=found)._replace(
        targets=targets, probabilities=mine, baseline=theirs, champion=ChampionEvidence("1", theirs)
    )
    floor = {"log_loss": 5, "ece": 0.9}.get(metric, 0.1)
    decision = decide(parse_policy(f"metric: {metric}\nfloor: {floor}\nmax_ece: none"), given)
    judged = {r["rule"]: r["passed"] for r in decision["rules"]}
    assert judged["floor"] is True
    if metric != "ece":  # noise is not worse calibrated than a good model need be
        assert judged["baseline"] is judged["champion"] is True


def test_no_test_image_is_a_users_mistake() -> None:
    """A division by nought is no answer."""
    with pytest.raises(UserError, match="test split: is empty"):
        decide(parse_policy(""), evidence()._replace(targets=TARGETS[:0], probabilities=guesses(0)[:0]))


def test_mcnemar_counts_the_images_on_which_one_alone_is_right() -> None:
    """Images that both models have right say nothing of which is better."""
    assert mcnemar(TARGETS, guesses(100), guesses(105)) == (5, 0, pytest.approx(1 / 32))
    assert mcnemar(TARGETS, guesses(100), guesses(100)) == (0, 0, 1.0)
    assert mcnemar(TARGETS, guesses(3), guesses(2, 500)) == (2, 3, pytest.approx(26 / 32))


def test_policy_names_every_headline() -> None:
    """A metric that is shown could not be decided by."""
    assert set(get_args(Metric)) == set(HEADLINES)


def test_empty_policy_is_the_default_one() -> None:
    """A section whose lines are commented out is no mistake."""
    for text in ("", "  \n", "# nothing", "champion:\nbaseline:\n", "floor: none", "max_warnings: ~"):
        assert parse_policy(text) == parse_policy("")
    assert parse_policy("champion: {margin: 1e-2}").champion.margin == 0.01


def test_example_of_the_documentation_is_the_default_policy() -> None:
    """Who starts from the example would start from something else than it says."""
    blocks = EXAMPLE.read_text(encoding="utf-8").split("```yaml\n")[1:]
    texts = [block.split("```")[0] for block in blocks]
    assert parse_policy(texts[0]) == parse_policy("")
    assert all(parse_policy(text) for text in texts[1:])


MISTAKES = {
    "metric: accurate": "policy: metric = 'accurate': input should be 'accuracy', 'balanced_accuracy'",
    "flor: 0.9": "policy: flor: is not known; did you mean floor?",
    "zzz: 1": "policy: zzz: is not known; it may have metric, floor",
    "1: 2": "policy: 1: is not known",
    "floor: yes": "policy: floor = 'yes': input should be a valid number",
    "floor: [1]": "policy: floor = a list: input should be a valid number",
    "floor: .nan": "policy: floor = nan: input should be a finite number",
    "floor: -1": "policy: floor = -1: input should be greater than or equal to 0",
    "floor: 90": "policy: floor: accuracy is a share, from 0 to 1; write 0.9 for 90%",
    "floor: 0.9\nfloor: 0.8": "policy: floor: is on line 1 and on line 2; keep one",
    "floor: 2024-13-01": "policy: month must be in 1..12",
    "worst_class_recall: 1.1": "policy: worst_class_recall = 1.1: input should be less than or equal to 1",
    "max_ece: 5": "policy: max_ece = 5: input should be less than or equal to 1",
    "max_warnings: 2.5": "policy: max_warnings = 2.5: input should be a valid integer",
    "max_latency_ms: 0": "policy: max_latency_ms = 0: input should be greater than 0",
    "max_size_mb: 14 MB": "policy: max_size_mb = '14 MB': input should be a valid number",
    "champion: 3": "policy: champion: write a mapping of by, margin, confidence",
    "champion: {by: sure}": "policy: champion.by = 'sure': input should be 'confidence', 'margin' or 'not-worse'",
    "champion: {by: not-worse}": "policy: champion.margin: by: not-worse needs one above 0",
    "champion: {margn: 1}": "policy: champion.margn: is not known; did you mean margin?",
    "champion: {margin: 3}": "policy: champion.margin: accuracy is a share",
    "champion: {confidence: 95}": "policy: champion.confidence = 95: input should be less than 1",
    "champion:\n  by: margin\n  by: confidence": "policy: champion.by: is on line 2 and on line 3; keep one",
    "baseline: {by: not-worse}": "policy: baseline.by = 'not-worse': input should be 'margin' or 'confidence'",
    "- a": "policy: is a list; write a mapping of metric, floor",
    "accuracy": "policy: is a str; write a mapping of metric, floor",
    "floor: [": "policy: line 1: ",
    "floor: 1\n---\nfloor: 1": "policy: line 2: ",
    "x: &a [*a]": "policy: x: is not known",
    "? [1]\n: 2": "policy: line 1: ",
    "[" * 5000: "policy: ",
    "fl\x07oor: 1": "policy: ",
}


@pytest.mark.parametrize("text", MISTAKES, ids=lambda text: text[:30])
def test_mistake_is_one_line_that_names_the_key(text: str) -> None:
    """A policy that is misread decides by rules that nobody wrote."""
    with pytest.raises(UserError) as found:
        parse_policy(text)
    said = str(found.value)
    assert said.startswith(MISTAKES[text]) and said.isprintable() and len(said) < 500
