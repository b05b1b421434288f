"""Pages and pictures: what the steps found, for a person to look at. Every page is one file with nothing outside it."""

import base64
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from graftwork.errors import one_line

INK, BLUE, ORANGE, GREY = "#1f2933", "#2463eb", "#e8590c", "#9aa5b1"
TITLES = {"baseline": "frozen features + linear probe", "fine_tuned": "fine-tuned", "scratch": "from scratch (control)"}


def render(template: str, **values: Any) -> str:
    """Return an HTML page; everything in it is escaped."""
    return _environment(escape=True).get_template(template).render(titles=TITLES, **values)


def render_text(template: str, **values: Any) -> str:
    """Return a text of Markdown; names go through the filter ``cell``."""
    return _environment(escape=False).get_template(template).render(titles=TITLES, **values)


def _environment(escape: bool) -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("graftwork"),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda value: "–" if value is None else f"{100 * value:.1f} %"
    environment.filters["decimals"] = lambda value, places=3: "–" if value is None else f"{value:.{places}f}"
    environment.filters["cell"] = markdown
    environment.filters["sentence"] = lambda text: markdown(text, 400)
    environment.filters["python"] = repr
    return environment


def markdown(text: str, limit: int = 80) -> str:
    """Return somebody's words as Markdown shows them, on one line: nothing in them is markup or HTML."""
    # MLflow's page takes a tag's signs for a tag, be there a backslash before them.
    signs = {ord(c): f"\\{c}" for c in "\\`*_[]|#"} | {ord("<"): "&lt;", ord(">"): "&gt;", ord("&"): "&amp;"}
    return one_line(text, limit).translate(signs)


def render_validation(summary: dict[str, Any], pictures: dict[str, list[list[dict[str, str]]]]) -> str:
    """Return the page of ``validate_data``; ``pictures`` are cards of examples by rule, as ``graftwork.validate.cards`` makes them."""
    from graftwork.modality import looks

    own = looks(summary)
    order = {"critical": 0, "warning": 1}
    rules = sorted(summary["rules"], key=lambda r: (r["passed"], order[r["severity"]]))
    edges = [f"{edge:.0f}" for edge in own.EDGES[own.SIZE[0]]]
    sizes = [
        {"label": f"{low}–{high}", "count": count}
        for low, high, count in zip(edges[:-1], edges[1:], summary["sizes"], strict=True)
    ]
    shown = [n for n, size in enumerate(sizes) if size["count"]]
    return render(
        "validation.html",
        summary=summary,
        rules=rules,
        pictures=pictures,
        noun=own.NOUN,
        heading=own.SIZE[1],
        sizes=sizes[shown[0] : shown[-1] + 1] if shown else [],
        largest=max([size["count"] for size in sizes], default=1) or 1,
        most=max([n for by_class in summary["classes"].values() for n in by_class.values()], default=1) or 1,
    )


def render_evaluation(
    result: dict[str, Any],
    dataset: dict[str, Any],
    model: dict[str, Any],
    folder: Path,
    outcome: dict[str, Any] | None = None,
) -> str:
    """Return the page of an evaluation, one HTML file with the pictures of ``folder`` inside it.

    ``outcome`` is what ``graftwork.register.register`` returned: the page then begins with the decision.
    """
    from graftwork.modality import inputs, transforms

    champion = (outcome or {}).get("champion")
    rivals = {TITLES.get(name, name): found for name, found in result["comparisons"].items()}
    if champion and champion.get("comparison"):
        rivals = {f"the champion, version {champion['version']}": champion["comparison"]} | rivals
    chosen = result["candidates"][result["chosen"]]
    return render(
        "evaluation.html",
        result=result,
        dataset=dataset,
        model=model,
        outcome=outcome,
        champion=champion,
        best=chosen["test"],
        rivals=[(name, found, gain_in_words(found)) for name, found in rivals.items()],
        pictures={path.stem: inline(path) for path in sorted(folder.glob("*.png"))},
        mistakes=[shown(one, folder) for one in result["mistakes"]],
        attributed=any(one.get("words") for one in result["mistakes"]),
        tint=tint,
        spreads=[spread(TITLES.get(name, name), one) for name, one in result["candidates"].items() if one.get("seeds")],
        size=inputs(model).size_in_words(model["preprocess"]),
        library=transforms(model).LIBRARIES[0],
        by_class=sorted(
            chosen["test"]["per_class"], key=lambda one: (one["recall"] is None, one["recall"] or 0, one["class"])
        ),
    )


def shown(mistake: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a mistake of ``evaluation.json`` as the page needs it: pictures inside it, texts in pieces."""
    files = {key: inline(folder / mistake[key]) for key in ("picture", "saliency") if mistake.get(key)}
    return mistake | files | ({"pieces": pieces(mistake)} if "words" in mistake else {})


def pieces(mistake: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a text cut at its words, {"text", "weight", "unread"}: the weight of a word, None of what lies between; joined they are the text."""
    text, read = mistake["text"], mistake["read"]
    found: list[dict[str, Any]] = []

    def add(end: int, weight: float | None, unread: bool = False) -> None:
        start = sum(len(piece["text"]) for piece in found)
        if end > start:
            found.append({"text": text[start:end], "weight": weight, "unread": unread})

    at = 0
    for word, weight in mistake["words"]:
        start = text.index(word, at)
        at = start + len(word)
        add(start, None)
        add(at, weight)
    add(read, None)
    add(len(text), None, unread=True)
    return found


def tint(weight: float) -> str:
    """Return the background of a word, as CSS: blue for the predicted label, orange against it, none for nothing."""
    colour = BLUE if weight > 0 else ORANGE
    red, green, blue = (int(colour[n : n + 2], 16) for n in (1, 3, 5))
    return f"rgba({red},{green},{blue},{0.6 * min(1.0, abs(weight)):.2f})"


def spread(title: str, candidate: dict[str, Any]) -> dict[str, Any]:
    """Return what several seeds of a candidate reached on validation, by the metric that chose among them, and the seed that was kept."""
    from graftwork.selection import rank

    metric = str(candidate["val"]["metric"]).removeprefix("val_")
    values = [float(one[f"val_{metric}"]) for one in candidate["seeds"]]
    return {
        "name": title,
        "seeds": len(values),
        "metric": metric.replace("_", " "),
        "mean": float(np.mean(values)),
        "deviation": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "lowest": min(values),
        "highest": max(values),
        "kept": max(candidate["seeds"], key=lambda one: rank(metric, one))["seed"],
    }


def inline(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def gain_in_words(found: dict[str, Any]) -> str:
    """Say in a sentence whether a difference between two models is real."""
    if found["difference"] is None:
        return "cannot be compared: the figure is not defined on this test"
    points = f"{100 * found['difference']:+.1f} points"
    if found["interval"] is None:
        return f"{points}, on too few examples for an interval"
    low, high = (f"{100 * bound:+.1f}" for bound in found["interval"])
    p = "p < 0.001" if found["p_value"] < 0.001 else f"p = {found['p_value']:.3f}"
    told = f"{points}, interval {low} to {high}, McNemar {p}"
    # Both have to say so: the interval is of the difference, the test of the examples that one of them alone has right.
    if found["interval"][0] > 0 and found["p_value"] < 0.05:
        return f"the gain is real: {told}"
    if found["interval"][1] < 0 and found["p_value"] < 0.05:
        return f"the loss is real: {told}"
    return f"cannot be told from chance: {told}"


def confused_pairs(confusion: npt.NDArray[np.int64], classes: list[str], top: int = 8) -> list[dict[str, Any]]:
    """Return the most frequent (label, predicted) mistakes, with their count and their share of the label's examples."""
    off = confusion.copy()
    np.fill_diagonal(off, 0)
    order = np.argsort(off, axis=None, kind="stable")[::-1][:top]
    pairs = [(int(n) // len(classes), int(n) % len(classes)) for n in order]
    return [
        {
            "label": classes[i],
            "predicted": classes[j],
            "count": int(off[i, j]),
            "share": float(off[i, j] / max(confusion[i].sum(), 1)),
        }
        for i, j in pairs
        if off[i, j]
    ]


def _figure(width: float, height: float) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update(
        {"font.size": 9, "axes.edgecolor": GREY, "text.color": INK, "axes.labelcolor": INK, "text.parse_math": False}
    )
    return plt.subplots(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure.savefig(path, dpi=130, metadata={"Software": ""})
    plt.close(figure)


def confusion_picture(confusion: npt.NDArray[np.int64], classes: list[str], path: Path) -> None:
    """Draw the confusion matrix: rows are labels, columns predictions, colour is the share of the row."""
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    side = min(14.0, 2.5 + 0.45 * len(classes))
    figure, axes = _figure(side + 0.8, side)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    short = [c if len(c) <= 18 else c[:17] + "…" for c in classes]
    if len(classes) <= 40:
        axes.set_xticks(range(len(classes)), short, rotation=45, ha="right")
        axes.set_yticks(range(len(classes)), short)
    if len(classes) <= 15:
        for i, j in np.ndindex(*confusion.shape):
            if confusion[i, j]:
                axes.text(
                    j,
                    i,
                    int(confusion[i, j]),
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    color="white" if share[i, j] > 0.5 else INK,
                )
    axes.set(xlabel="predicted", ylabel="label")
    _save(figure, path)


def reliability_picture(before: list[dict[str, float]], after: list[dict[str, float]], path: Path) -> None:
    """Draw accuracy against confidence, before and after temperature scaling: a calibrated model lies on the diagonal."""
    figure, axes = _figure(4.2, 3.6)
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
    most = max([b["examples"] for b in before + after], default=1)
    for bins, colour, name in ((before, ORANGE, "before scaling"), (after, BLUE, "as served")):
        axes.scatter(
            [b["confidence"] for b in bins],
            [b["accuracy"] for b in bins],
            s=[15 + 200 * b["examples"] / most for b in bins],
            color=colour,
            alpha=0.6,
            linewidths=0,
            label=name,
        )
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02))
    legend = axes.legend(loc="upper left", frameon=False)
    for handle in legend.legend_handles:
        handle.set_sizes([40])
    _save(figure, path)


def curves_picture(score: dict[str, Any], path: Path) -> None:
    """Draw the ROC curve of all one-against-rest decisions together (micro average); nothing where there is none."""
    if not score["roc"]:
        return
    figure, axes = _figure(4.2, 3.6)
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
    axes.plot(score["roc"]["fpr"], score["roc"]["tpr"], color=BLUE)
    axes.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(-0.01, 1), ylim=(0, 1.01))
    _save(figure, path)


def history_picture(history: list[dict[str, float]], path: Path) -> None:
    """Draw validation accuracy and training loss by epoch."""
    figure, axes = _figure(5.2, 3.2)
    axes.plot([h["epoch"] for h in history], [h["val_accuracy"] for h in history], color=BLUE, marker="o", markersize=3)
    axes.set(xlabel="epoch")
    axes.set_ylabel("validation accuracy", color=BLUE)
    trained = [h for h in history if "train_loss" in h]
    if trained:
        loss = axes.twinx()
        loss.plot(
            [h["epoch"] for h in trained], [h["train_loss"] for h in trained], color=ORANGE, marker="o", markersize=3
        )
        loss.set_ylabel("training loss", color=ORANGE)
    _save(figure, path)
