"""Pages and pictures: what the steps found, for a person to look at. Every page is one file with nothing outside it."""

import base64
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

INK, BLUE, ORANGE, GREY = "#1f2933", "#2463eb", "#e8590c", "#9aa5b1"
TITLES = {"baseline": "frozen features + linear probe", "fine_tuned": "fine-tuned", "scratch": "from scratch (control)"}


def render(template: str, **values: Any) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("graftwork"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda value: f"{100 * value:.1f} %"
    return environment.get_template(template).render(titles=TITLES, **values)


def render_validation(summary: dict[str, Any], pictures: dict[str, list[list[dict[str, str]]]]) -> str:
    """Return the page of ``validate_data``; ``pictures`` are cards of examples by rule, as ``graftwork.validate.cards`` makes them."""
    from graftwork.drift import EDGES

    order = {"critical": 0, "warning": 1}
    rules = sorted(summary["rules"], key=lambda r: (r["passed"], order[r["severity"]]))
    edges = [f"{edge:.0f}" for edge in EDGES["side"]]
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
        sizes=sizes[shown[0] : shown[-1] + 1] if shown else [],
        largest=max([size["count"] for size in sizes], default=1) or 1,
        most=max([n for by_class in summary["classes"].values() for n in by_class.values()], default=1) or 1,
    )


def render_evaluation(result: dict[str, Any], dataset: dict[str, Any], model: dict[str, Any], folder: Path) -> None:
    """Write ``report.html``, the pictures in ``folder`` inside it."""
    pictures = {
        p.stem: f"data:image/png;base64,{base64.b64encode(p.read_bytes()).decode()}"
        for p in sorted(folder.glob("*.png"))
    }
    confusion = np.array(result["candidates"][result["chosen"]]["test"]["confusion"])
    page = render(
        "evaluation.html",
        result=result,
        dataset=dataset,
        model=model,
        pictures=pictures,
        pairs=confused_pairs(confusion, result["classes"]),
    )
    (folder / "report.html").write_text(page, encoding="utf-8")


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


def reliability_picture(bins: list[dict[str, float]], path: Path) -> None:
    """Draw accuracy against confidence: a calibrated model lies on the diagonal."""
    figure, axes = _figure(4.2, 3.6)
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
    sizes = np.array([b["examples"] for b in bins])
    axes.scatter(
        [b["confidence"] for b in bins],
        [b["accuracy"] for b in bins],
        s=15 + 200 * sizes / max(sizes.max(initial=0), 1),
        color=BLUE,
        alpha=0.75,
    )
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02))
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
