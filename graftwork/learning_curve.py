"""Learning curves: what transfer is worth at each number of labels, and how many labels and how much time it saves.

A cell of the curve is one number of labels a class and one seed: the baseline, the fine-tuned network and the one from scratch, each
trained on the same examples and tested on the same examples. Finished cells are kept, so a curve that is stopped goes on where it stopped.
"""

import csv
import hashlib
import io
import json
import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from graftwork.dataset import open_dataset
from graftwork.errors import UserError, one_line
from graftwork.files import write_json
from graftwork.settings import EvaluateSettings, FeatureSettings, FineTuneSettings, IngestSettings, S, parse

CANDIDATES = ("baseline", "fine_tuned", "scratch")
NAMES = {"baseline": "frozen features", "fine_tuned": "fine-tuned", "scratch": "from scratch"}
# What a cell does, in order, in the words of the progress bar.
STAGES = {"data": "ingest", "baseline": "frozen features", "fine_tuned": "fine-tune", "scratch": "from scratch"}
Stage = Callable[[str, int, int], None]  # stage, done, total
Points = list[tuple[int, float, float]]  # of one candidate: labels a class, accuracy, seconds; fewest labels first


class Cell(NamedTuple):
    per_class: int
    seed: int

    def __str__(self) -> str:
        return f"{self.per_class}-a-class-seed-{self.seed}"


# ---- measuring -----------------------------------------------------------------------------------------------------------------


def parse_numbers(text: str, option: str, least: int) -> list[int]:
    """Read "5,10,30": whole numbers of at least ``least``, none of them twice, in the order given."""
    numbers = []
    for part in text.split(","):
        # ASCII alone: int() takes "1_000" and other scripts' digits, and refuses 5,000 of them with a trace.
        if not (part.strip().isascii() and part.strip().isdigit()) or len(part.strip()) > 12 or int(part) < least:
            raise UserError(
                f"{option} '{one_line(text, 80)}': '{one_line(part.strip(), 40)}' is no whole number of at least {least}; "
                f"write numbers with commas between them, as in {option} {'5,10,30,100' if least else '0,1,2'}"
            )
        numbers.append(int(part))
    twice = [n for n in numbers if numbers.count(n) > 1]
    if twice:
        raise UserError(f"{option} '{one_line(text, 80)}': holds {twice[0]} twice; give each number once")
    return numbers


def curve_folder(parameters: dict[str, Any], cache: Path, build: str) -> Path:
    """Return the folder under ``cache`` for the cells of a curve: another one for other data, settings, weights or code (``build``)."""
    models = (IngestSettings, FeatureSettings, FineTuneSettings, EvaluateSettings)
    relevant = {name for model in models for name in model.model_fields} - {"seed", "train_per_class"}
    weights = Path(str(parameters["weights"]))
    weights = weights / "model.safetensors" if weights.is_dir() else weights
    status = weights.stat() if weights.is_file() else None
    key = json.dumps(
        [
            {name: parameters[name] for name in sorted(relevant)},
            [status.st_size, status.st_mtime_ns] if status else [],
            build,
        ]
    )
    return cache / "learning-curve" / hashlib.sha256(key.encode()).hexdigest()[:16]


def read_cell(folder: Path, cell: Cell) -> dict[str, Any] | None:
    """Return a finished cell: its dataset's name, digest and counts, and ``points``, one a candidate; None where there is none."""
    try:
        content = json.loads((folder / f"{cell}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return dict(content)


def check_labels(
    parameters: dict[str, Any], cells: Iterable[Cell], folder: Path, stage: Callable[[Cell], Stage]
) -> list[str]:
    """Pack the largest dataset of every seed, and return notes on classes that have fewer examples than asked.

    Before anything is trained: a curve whose last point cannot be had should not be found out after an hour.

    Raises:
        UserError: no class has so many labels, or there is nothing to test on.
    """
    largest: dict[int, Cell] = {}
    for cell in cells:
        largest[cell.seed] = max(cell, largest.get(cell.seed, cell))
    held: dict[str, int] = {}  # class: training examples, where fewer than asked; the fewest of all seeds
    most, broken = [], 0
    for cell in largest.values():
        done = read_cell(folder, cell)
        try:
            info = done["dataset"] if done else pack(parameters, cell, folder, stage(cell))
            broken = max(broken, info["broken"])
            if not sum(info["counts"]["test"].values()):
                raise UserError("test split: is empty, so there is no curve; add test examples or raise test_fraction")
            most.append(max(info["counts"]["train"].values()))
            if most[-1] < cell.per_class:
                raise UserError(
                    f"per-class {cell.per_class}: no class has more than {min(most)} training examples once the test and validation "
                    f"examples are set apart; ask for at most {min(most)}"
                )
        except UserError:
            shutil.rmtree(folder / f"{cell}.work", ignore_errors=True)
            raise
        for label, count in info["counts"]["train"].items():
            if count < cell.per_class:
                held[label] = min(count, held.get(label, count))
    notes = [f"{broken} examples cannot be decoded and are left out"] if broken else []
    if held:
        some = ", ".join(f"{one_line(label, 40)} {count}" for label, count in sorted(held.items())[:5])
        some += f" and {len(held) - 5} more classes" if len(held) > 5 else ""
        notes.append(f"fewer training examples than asked, so these give all they have: {some}")
    return notes


def pack(parameters: dict[str, Any], cell: Cell, folder: Path, stage: Stage) -> dict[str, Any]:
    """Ingest the cell's dataset if it is not there, and return what is kept of it: name, digest, counts, number of broken examples.

    The examples of a small size are among those of a larger one, and the test examples are the same at every size: ``ingest`` takes the first
    of each class in an order that only the contents and the seed decide.
    """
    path = folder / f"{cell}.work" / "dataset"
    if not (path / "dataset.json").is_file():
        from graftwork.ingest import ingest

        ingest(settings_of(IngestSettings, parameters, cell), path, lambda done, total: stage("data", done, total))
    info = open_dataset(path).info
    return {**{k: info[k] for k in ("name", "digest", "counts")}, "broken": len(info["broken"])}


def measure_cell(parameters: dict[str, Any], cell: Cell, folder: Path, stage: Stage) -> dict[str, Any]:
    """Train and test the three candidates of one cell, or go on where that was stopped; keep the result as CELL.json in ``folder``.

    Models are kept beside it until the cell is finished, each under its name only once it is whole.
    """
    import sklearn.linear_model  # noqa: F401  imported here, before the work is timed

    from graftwork.baseline import train_baseline
    from graftwork.evaluate import evaluate
    from graftwork.features import extract_features
    from graftwork.finetune import fine_tune

    work = folder / f"{cell}.work"
    dataset = pack(parameters, cell, folder, stage)
    data = open_dataset(work / "dataset", dataset["digest"])
    if not (work / "embeddings").is_dir():
        extract_features(
            data,
            settings_of(FeatureSettings, parameters, cell),
            work / "embeddings",
            lambda done, total: stage("baseline", done, total + 1),
        )
    if not (work / "baseline").is_dir():
        train_baseline(work / "embeddings", work / "baseline")
    settings = settings_of(FineTuneSettings, parameters, cell)
    for candidate, chosen in {
        "fine_tuned": settings,
        "scratch": settings.model_copy(update={"strategy": "scratch"}),
    }.items():
        if not (work / candidate).is_dir():
            fine_tune(
                data,
                work / "baseline",
                chosen,
                work / candidate,
                lambda done, total, name=candidate: stage(name, done, total + 1),  # type: ignore[misc]
            )
    result = evaluate(
        data,
        {name: work / name for name in CANDIDATES},
        settings_of(EvaluateSettings, parameters, cell),
        work / "evaluation",
    )
    points = [
        {
            "per_class": cell.per_class,
            "seed": cell.seed,
            "candidate": name,
            "test_accuracy": found["test"]["accuracy"],
            "test_accuracy_interval": found["test"]["accuracy_interval"],
            "test_macro_f1": found["test"]["macro_f1"],
            "val_accuracy": found["val"]["val"]["val_accuracy"],
            "seconds": found["seconds"],
            "strategy": found["hyperparameters"].get("strategy", "probe"),
            "chosen": name == result["chosen"],
        }
        for name, found in result["candidates"].items()
    ]
    content = {"format": "graftwork-learning-curve/1", "dataset": dataset, "points": points}
    write_json(folder / f"{cell}.json", content)
    shutil.rmtree(work, ignore_errors=True)
    return content


def settings_of(model: type[S], parameters: dict[str, Any], cell: Cell) -> S:
    values = {**parameters, "seed": cell.seed, "train_per_class": cell.per_class}
    return parse(model, {name: values[name] for name in model.model_fields})


# ---- what the points say -------------------------------------------------------------------------------------------------------


def summarise(points: list[dict[str, Any]], confidence: float) -> list[dict[str, Any]]:
    """Return a row a size: labels a class, each candidate's means over the seeds, the chosen one's, and its distance from the baseline."""
    rows = []
    for per_class in sorted({p["per_class"] for p in points}):
        here = [p for p in points if p["per_class"] == per_class]
        groups = {name: [p for p in here if p["candidate"] == name] for name in CANDIDATES}
        groups["chosen"] = [p for p in here if p["chosen"]]
        baseline = {p["seed"]: p["test_accuracy"] for p in groups["baseline"]}
        gains = [100 * (p["test_accuracy"] - baseline[p["seed"]]) for p in groups["chosen"]]
        rows.append(
            {
                "per_class": per_class,
                "candidates": {name: means(group, confidence) for name, group in groups.items()},
                "chosen_minus_baseline": {"mean": mean(gains), "worst": min(gains)},  # points of accuracy
                "chosen": {name: sum(p["candidate"] == name for p in groups["chosen"]) for name in CANDIDATES},
            }
        )
    return rows


def means(points: list[dict[str, Any]], confidence: float) -> dict[str, Any]:
    accuracies = [p["test_accuracy"] for p in points]
    return {
        "test_accuracy": mean(accuracies),
        "test_accuracy_interval": interval(accuracies, [p["test_accuracy_interval"] for p in points], confidence),
        "test_macro_f1": mean([p["test_macro_f1"] for p in points]),
        "val_accuracy": mean([p["val_accuracy"] for p in points]),
        "seconds": mean([p["seconds"] for p in points]),
        "seeds": len(points),
    }


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def interval(accuracies: list[float], intervals: list[list[float]], confidence: float) -> list[float]:
    """Return the interval [low, high] of a mean over seeds, for other seeds and for other test examples.

    The seeds' part is Student's t on their spread; the test examples' part is the mean distance to the bounds of ``evaluate``'s
    bootstrap. They are independent, so their squares add up. With one seed, what is left is the bootstrap interval.
    """
    centre, seeds = mean(accuracies), 0.0
    if len(accuracies) > 1:
        from scipy.stats import t

        variance = math.fsum((a - centre) ** 2 for a in accuracies) / (len(accuracies) - 1)
        seeds = float(t.ppf(0.5 + confidence / 2, len(accuracies) - 1)) * math.sqrt(variance / len(accuracies))
    below, above = (mean([abs(a - bounds[n]) for a, bounds in zip(accuracies, intervals, strict=True)]) for n in (0, 1))
    return [max(0.0, centre - math.hypot(seeds, below)), min(1.0, centre + math.hypot(seeds, above))]


def points_of(rows: list[dict[str, Any]], candidate: str) -> Points:
    found = [(row["per_class"], row["candidates"][candidate]) for row in rows]
    return [(per_class, one["test_accuracy"], one["seconds"]) for per_class, one in found]


class Reach(NamedTuple):
    """Where a curve comes to an accuracy. ``bound``: "" between two measured sizes, "at most" at the first of them, "more than" at none."""

    labels: float  # a class
    seconds: float
    bound: str


def reach(points: Points, accuracy: float) -> Reach:
    """Return where ``points``, joined by straight lines over the logarithm of the labels, first come to ``accuracy``."""
    if points[0][1] >= accuracy:
        return Reach(points[0][0], points[0][2], "at most")
    for (labels, before, seconds), (more_labels, after, more_seconds) in pairwise(points):
        if after >= accuracy:
            share = (accuracy - before) / (after - before)
            return Reach(labels * (more_labels / labels) ** share, seconds * (more_seconds / seconds) ** share, "")
    return Reach(points[-1][0], points[-1][2], "more than")


def savings(points: Points, against: Points) -> dict[str, Any]:
    """Return what a curve needs for the best accuracy of another one, ``against``.

    ``labels_factor`` and ``time_factor``: how many times fewer labels and less time (below 1: more). ``bound`` says how to read them: "" as
    they are, "at least" where the fewest labels measured are enough, "less than" where the most measured are not (no time is known then).
    """
    target = max(against, key=lambda p: p[1])  # the first of equals: the one with fewest labels
    found = reach(points, target[1])
    return {
        "target": {"per_class": target[0], "test_accuracy": target[1], "seconds": target[2]},
        "labels": found.labels,
        "seconds": None if found.bound == "more than" else found.seconds,
        "labels_factor": target[0] / found.labels,
        "time_factor": None if found.bound == "more than" else target[2] / found.seconds,
        "bound": {"": "", "at most": "at least", "more than": "less than"}[found.bound],
    }


def find_savings(points: list[dict[str, Any]], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the savings of fine-tuning and of frozen features against training from scratch; ``by_seed`` is the same for each seed alone."""
    found = {}
    for candidate in ("fine_tuned", "baseline"):
        curves: dict[int, dict[str, Points]] = defaultdict(lambda: defaultdict(list))
        for p in sorted(points, key=lambda p: int(p["per_class"])):
            curves[p["seed"]][p["candidate"]].append((p["per_class"], p["test_accuracy"], p["seconds"]))
        saved = savings(points_of(rows, candidate), points_of(rows, "scratch"))
        by_seed = {str(seed): savings(c[candidate], c["scratch"]) for seed, c in sorted(curves.items())}
        found[candidate] = {**saved, "by_seed": by_seed, "sentence": sentence(NAMES[candidate], saved, by_seed)}
    return found


def sentence(name: str, saved: dict[str, Any], by_seed: dict[str, dict[str, Any]] | None = None) -> str:
    """Say what was saved, and where it lies outside of what was measured."""
    target, bound = saved["target"], saved["bound"]
    goal = f"the best accuracy of training from scratch ({target['test_accuracy']:.3f} at {target['per_class']} labels a class)"
    name = name[0].upper() + name[1:]
    if bound == "less than":
        return f"{name}: {goal} is not reached with {saved['labels']:.0f} labels a class, the most measured; more than that are needed."
    labels, seconds = saved["labels"], f"{duration(saved['seconds'])} against {duration(target['seconds'])}"
    if bound == "at least" and saved["labels_factor"] == 1:
        less = times(saved["time_factor"], bound, "time")
        return (
            f"{name}: {goal} is reached with as many labels or fewer; how many fewer, only smaller sizes can tell. "
            f"{less[0].upper()}{less[1:]} ({seconds})."
        )
    how = (
        f"already with {labels:.0f} labels a class, the fewest measured"
        if bound
        else f"with {labels:.0f} labels a class"
    )
    spread = ""
    if by_seed and len(by_seed) > 1 and not any(one["bound"] for one in by_seed.values()):
        factors = [one["labels_factor"] for one in by_seed.values()]
        if min(factors) >= 1.05:
            spread = f" (by seed, {number(min(factors))} to {number(max(factors))})"
    fewer, less = times(saved["labels_factor"], bound, "labels"), times(saved["time_factor"], bound, "time")
    return f"{name}: {goal} is reached {how}: {fewer}{spread}, {less} ({seconds})."


def times(factor: float, bound: str, what: str) -> str:
    """Say a factor in words: "7.1 times fewer labels", "at least 60 times fewer labels", "1.5 times more time"."""
    fewer = "fewer" if what == "labels" else "less"
    if 0.95 < factor < 1.05:
        return f"{'no more' if bound else 'about the same'} {'number of labels' if what == 'labels' and not bound else what}"
    if factor < 1:  # what is at least a factor below 1 is at most its inverse above
        return f"{'at most ' if bound else ''}{number(1 / factor)} times more {what}"
    return f"{bound + ' ' if bound else ''}{number(factor)} times {fewer} {what}"


def number(factor: float) -> str:
    return f"{factor:.0f}" if factor >= 9.95 else f"{factor:.1f}"


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


# ---- showing it ----------------------------------------------------------------------------------------------------------------


def write_curve(curve: dict[str, Any], folder: Path) -> None:
    """Write ``curve.json``, ``curve.csv``, ``curve.png`` and ``report.html`` to ``folder``."""
    import base64

    from graftwork.files import write_text
    from graftwork.report import render

    write_json(folder / "curve.json", curve)
    write_text(folder / "curve.csv", table(curve["rows"]))
    partial = folder / "curve.partial.png"
    draw(curve, partial)
    picture = f"data:image/png;base64,{base64.b64encode(partial.read_bytes()).decode()}"
    partial.replace(folder / "curve.png")
    page = render(
        "learning_curve.html",
        curve=curve,
        names=NAMES,
        picture=picture,
        headline=headline(curve),
        chosen=chosen_sentence(curve["rows"]),
    )
    write_text(folder / "report.html", page)


def headline(curve: dict[str, Any]) -> str:
    """Return the answer in a few words."""
    saved = curve["savings"]["fine_tuned"]
    if saved["bound"] == "less than":
        return "fine-tuning does not reach the accuracy of training from scratch"
    if saved["bound"] and saved["labels_factor"] == 1:
        return "fine-tuning is as accurate as training from scratch with no more labels"
    words = [times(saved[f"{what}_factor"], saved["bound"], what) for what in ("labels", "time")]
    return f"fine-tuning reaches the accuracy of training from scratch with {words[0]} and {words[1]}"


def chosen_sentence(rows: list[dict[str, Any]]) -> str:
    """Say how far the chosen model is from the baseline: choosing on validation should never cost more than it gains."""
    gains = [row["chosen_minus_baseline"] for row in rows]
    low, high, worst = min(g["mean"] for g in gains), max(g["mean"] for g in gains), min(g["worst"] for g in gains)
    return (
        f"Chosen on validation: {low:+.2f} to {high:+.2f} points against the frozen features, by size; "
        f"{worst:+.2f} at the worst size and seed."
    )


COLUMNS = [
    *("per_class", "candidate", "seeds", "test_accuracy", "low", "high", "test_macro_f1", "val_accuracy", "seconds"),
    "chosen_minus_baseline_points",
]


def table(rows: list[dict[str, Any]]) -> str:
    """Return CSV, a line a size and candidate."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        for name, one in row["candidates"].items():
            figures = [one["test_accuracy"], *one["test_accuracy_interval"], one["test_macro_f1"], one["val_accuracy"]]
            gain = f"{row['chosen_minus_baseline']['mean']:.3f}" if name == "chosen" else ""
            writer.writerow(
                [row["per_class"], name, one["seeds"], *(f"{f:.5f}" for f in figures), f"{one['seconds']:.2f}", gain]
            )
    return text.getvalue()


# Okabe and Ito's colours, which the colour-blind tell apart; each curve has its own marker as well.
COLOURS = {"baseline": "#d55e00", "fine_tuned": "#0072b2", "scratch": "#5b6670"}
# Seconds that a tick may stand at, and more of them for a short axis.
MOMENTS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1800, 3600, 10800, 36000, 108000, 360000]
FINE_MOMENTS = [*MOMENTS, 0.05, 0.2, 0.5, 2, 4, 6, 8, 15, 20, 25, 40, 50, 90, 180, 240, 900, 1200, 2400, 7200, 18000]
MARKERS = {"baseline": "s", "fine_tuned": "o", "scratch": "^"}


def draw(curve: dict[str, Any], path: Path) -> None:
    """Draw accuracy against labels, with its intervals, and against seconds; an arrow in each is what transfer saves."""
    from graftwork.report import GREY, INK, _figure, _save

    rows, saved = curve["rows"], curve["savings"]["fine_tuned"]
    figure, axes = _figure(10.4, 4.5)
    axes.remove()
    left, right = figure.subplots(1, 2, sharey=True, gridspec_kw={"wspace": 0.04})
    curves = {name: points_of(rows, name) for name in CANDIDATES}
    sizes = [row["per_class"] for row in rows]
    for name, points in curves.items():
        _, accuracy, seconds = zip(*points, strict=True)
        style = {"color": COLOURS[name], "marker": MARKERS[name], "markersize": 5.5, "linewidth": 1.8, "zorder": 3}
        bounds = [row["candidates"][name]["test_accuracy_interval"] for row in rows]
        if len(rows) > 1:
            left.fill_between(sizes, *zip(*bounds, strict=True), color=COLOURS[name], alpha=0.14, linewidth=0)
        else:
            left.vlines(sizes, *zip(*bounds, strict=True), color=COLOURS[name], alpha=0.5)
        left.plot(sizes, accuracy, **style)
        right.plot(seconds, accuracy, **style)
    ticks = spread_ticks(sizes)
    left.set_xscale("log")
    left.set_xticks(ticks, [f"{n:,}" for n in ticks])
    left.set_xlabel("labels a class")
    left.set_ylabel("test accuracy")
    right.set_xscale("log")
    times_measured = [p[2] for points in curves.values() for p in points]
    shortest, longest = min(times_measured), max(times_measured)
    coarse, fine = ([n for n in ticks if shortest * 0.85 <= n <= longest * 1.2] for ticks in (MOMENTS, FINE_MOMENTS))
    moments = coarse if len(coarse) > 2 else fine
    moments = moments[:: 1 + len(moments) // 8]
    words = [f"{n:g} s" if n < 60 else f"{n / 60:g} min" if n < 3600 else f"{n / 3600:g} h" for n in moments]
    right.set_xticks(moments, words)
    right.tick_params(axis="y", length=0)
    right.set_xlabel("time to train")
    for one in (left, right):
        one.minorticks_off()
        one.spines[["top", "right"]].set_visible(False)
        one.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.7)
        one.set_axisbelow(True)
    left.set_ylim(*heights(rows))
    left.set_xlim(sizes[0] / 1.12, sizes[-1] * (sizes[-1] / sizes[0]) ** 0.36 * 1.12)  # room for the names
    right.set_xlim(shortest / 1.3, longest * 1.3)
    ends = {name: points[-1][1] for name, points in curves.items()}
    for name, y in apart(ends, 0.055 * (left.get_ylim()[1] - left.get_ylim()[0])).items():
        left.annotate(
            NAMES[name],
            (sizes[-1], y),
            (9, 0),
            textcoords="offset points",
            color=COLOURS[name],
            va="center",
            fontsize=10,
            fontweight="bold",
        )
    # At the last point of a curve, how many labels that is, so that the right picture is read without the left.
    for points, name in ((points, name) for name, points in curves.items()):
        for labels, y, x in (points[0], points[-1]) if len(points) > 1 else points:
            below = name == "scratch"
            right.annotate(
                f"{labels:,}",
                (x, y),
                (0, -8 if below else 8),
                textcoords="offset points",
                ha="center",
                va="top" if below else "bottom",
                fontsize=7.5,
                color=COLOURS[name],
            )
    if saved["bound"] != "less than":
        target = saved["target"]
        for one, what, factor, x, end in (
            (left, "labels", saved["labels_factor"], saved["labels"], target["per_class"]),
            (right, "time", saved["time_factor"], saved["seconds"], target["seconds"]),
        ):
            if factor < 1.05:
                continue
            y = target["test_accuracy"]
            arrow = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.2, "shrinkA": 5, "shrinkB": 2}
            one.annotate("", (x, y), (end, y), arrowprops=arrow, zorder=4)
            one.annotate(
                times(factor, saved["bound"], what),
                (math.sqrt(x * end), y),
                (0, -5),
                textcoords="offset points",
                ha="center",
                va="top",
                fontsize=9,
                bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1},
                zorder=5,
            )
    right.text(
        0.99,
        0.015,
        "small numbers: labels a class",
        transform=right.transAxes,
        ha="right",
        fontsize=7.5,
        color=COLOURS["scratch"],
    )
    _save(figure, path)


def heights(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Return the ends of the axis of accuracy: intervals that are much wider than the curves are high run out of the picture."""
    found = [row["candidates"][name] for row in rows for name in CANDIDATES]
    least, most = min(one["test_accuracy"] for one in found), max(one["test_accuracy"] for one in found)
    room = 0.3 * max(most - least, 0.05)
    low = max(least - room, min(one["test_accuracy_interval"][0] for one in found))
    high = min(most + room, max(one["test_accuracy_interval"][1] for one in found))
    return max(0.0, low - 0.2 * room), high + 0.2 * room


def spread_ticks(sizes: list[int]) -> list[int]:
    """Return the sizes whose labels fit beside each other on a logarithmic axis: the ends, and what lies well apart between them."""
    kept = [sizes[0]]
    width = math.log(sizes[-1] / sizes[0]) or 1.0
    for size in sizes[1:-1]:
        if math.log(size / kept[-1]) / width > 0.07 and math.log(sizes[-1] / size) / width > 0.07:
            kept.append(size)
    return kept + [sizes[-1]] * (len(sizes) > 1)


def apart(heights: dict[str, float], gap: float) -> dict[str, float]:
    """Move heights as little as needed for any two to lie ``gap`` apart, their order kept."""
    order = sorted(heights, key=heights.__getitem__)
    moved = dict(heights)
    for _ in range(50):
        for lower, upper in pairwise(order):
            lacking = gap - (moved[upper] - moved[lower])
            if lacking > 1e-9:
                moved[lower] -= lacking / 2
                moved[upper] += lacking / 2
    return moved
