"""The report and the model card: what a reviewer reads, from the run's facts alone."""

import ast
import copy
import json
import re
from typing import Any

import pytest

from graftwork.card import model_card
from graftwork.evaluate import evaluate
from graftwork.model import read_info
from graftwork.report import gain_in_words, markdown, render_evaluation
from graftwork.settings import EvaluateSettings


@pytest.fixture(scope="module")
def run(dataset, baseline, tuned, tmp_path_factory):
    """(evaluation.json, its folder, the chosen model's model.json) of a real evaluation."""
    folder = tmp_path_factory.mktemp("report") / "evaluation"
    models = {"baseline": baseline, "fine_tuned": tuned}
    result = evaluate(dataset, models, EvaluateSettings(resamples=200), folder)
    return json.loads(json.dumps(result)), folder, read_info(models[result["chosen"]])


def outcome(run: Any) -> dict[str, Any]:
    result, _, _ = run
    other = next(iter(result["comparisons"].values()))
    return {
        "decision": {
            "promoted": False,
            "reasons": ["the champion, version 3, is not beaten"],
            "rules": [
                {
                    "rule": "champion",
                    "passed": False,
                    "figures": {},
                    "reason": "the champion, version 3, is not beaten",
                },
                {"rule": "max_size_mb", "passed": None, "figures": {}, "reason": "no bound is set"},
            ],
        },
        "registered": {"name": "digits", "version": 4, "aliases": ["challenger"]},
        "champion": {"version": 3, "comparison": other, "score": result["candidates"]["baseline"]["test"]},
    }


def text_of(page: str) -> str:
    return re.sub(r"\\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)))


def test_the_decision_comes_first(dataset, run) -> None:
    """A reviewer wants to know whether it goes into service before she wants a table."""
    result, folder, info = run
    page = render_evaluation(result, dataset.info, info, folder, outcome(run))
    words = text_of(page)
    assert words.index("Not promoted") < words.index("Is it better?") < words.index("Candidates")
    assert "digits version 4 (challenger)" in words and "the champion, version 3" in words
    assert "http" not in page.replace("http-equiv", "") and "<script" not in page
    assert "Not promoted" not in render_evaluation(result, dataset.info, info, folder)


def test_names_are_text_and_no_markup(dataset, run) -> None:
    """A class or a file named like a tag would run in the reviewer's browser, or break the card's table."""
    result, folder, info = copy.deepcopy(run)
    bad = "<script>alert(1)</script>|x"
    result["classes"][0] = bad
    for candidate in result["candidates"].values():
        candidate["test"]["per_class"][0]["class"] = bad
    result["confused"] = [{"label": bad, "predicted": "1", "count": 2, "share": 0.1}]
    counts = {split: {bad: 1, **held} for split, held in dataset.info["counts"].items()}
    facts = {**dataset.info, "name": bad, "counts": counts}
    page = render_evaluation(result, facts, info, folder)
    assert "<script" not in page and "&lt;script&gt;" in page
    card = model_card(result, facts, info, None, "digits")
    assert "<" not in card and "\\|x" in card
    result["notes"] = [f"class {bad} has no test images"]
    said = outcome(run)
    said["decision"]["reasons"] = [f"the worst class, {bad}, is below the floor"]
    card = model_card(result, facts, info, said, 'a"); import os; ("')
    # Of "p < 0.001" too: MLflow's page takes it for the begin of a tag, and the next table is lost.
    assert "<" not in card.split("```")[0] + card.split("```")[2]
    snippet = card.split("```python")[1].split("```")[0]
    loaded = ast.parse(snippet).body[1].value
    assert loaded.args[0].value == 'models:/a"); import os; ("/4', "not promoted: the champion is another model"


def test_missing_figures_are_dashes(dataset, run) -> None:
    """A figure that is not defined must not look like one that is nought, nor end the run."""
    result, folder, info = copy.deepcopy(run)
    test = result["candidates"][result["chosen"]]["test"]
    test |= {"auroc": None, "auroc_interval": None, "average_precision": None, "average_precision_interval": None}
    test["per_class"][0] |= {"recall": None, "recall_interval": None, "f1": None}
    for name in ("mistakes", "label_errors", "slices", "confused"):
        result[name] = []
    words = text_of(render_evaluation(result, dataset.info, info, folder))
    assert "–" in words
    for heading in ("surest", "likely wrong", "Slices", "What it confuses", "Distorted"):
        assert heading not in words
    assert "nan" not in words.lower().split() and "None" not in words


@pytest.mark.parametrize(
    ("interval", "p", "words"),
    [
        ([0.01, 0.05], 0.0001, "the gain is real: +3.0 points, interval +1.0 to +5.0, McNemar p < 0.001"),
        ([-0.05, -0.01], 0.02, "the loss is real"),
        ([-0.01, 0.05], 0.2, "cannot be told from chance"),
        ([0.001, 0.03], 0.21, "cannot be told from chance"),
        (None, 1.0, "too few examples"),
    ],
)
def test_whether_a_gain_is_real(interval, p, words: str) -> None:
    """A gain within the noise, told as a gain, is what a sceptic looks for."""
    assert words in gain_in_words({"difference": 0.03, "interval": interval, "p_value": p})
    assert "cannot be compared" in gain_in_words({"difference": None, "interval": None, "p_value": 1.0})


def test_card_says_what_the_run_found_and_fits(dataset, run) -> None:
    """The description in the registry is all that most people read of a model; MLflow's databases cut what is longer."""
    result, _, info = run
    told = model_card(result, dataset.info, info, outcome(run), "digits")
    test = result["candidates"][result["chosen"]]["test"]
    assert len(told) <= 5000
    for fact in (f"{100 * test['accuracy']:.1f} %", result["dataset_digest"], info["sha256"], "**Not promoted:**"):
        assert fact in told
    short = model_card(result, dataset.info, info, None, "digits", limit=len(told) - 400)
    assert len(short) <= len(told) - 400 and "more classes are in the report" in short
    tiny = model_card(result, dataset.info, info, None, "digits", limit=300)
    assert len(tiny) <= 300 and tiny.startswith(f"{100 * test['accuracy']:.1f} % on 150 test images")


def test_markdown_takes_nothing_from_names() -> None:
    """A class named like markup would change the card."""
    assert markdown("a|b*c") == "a\\|b\\*c" and "\n" not in markdown("two\nlines")
