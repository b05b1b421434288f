"""A learning curve on this machine, in one process: cells one after the other, their points carried to MLflow in the background."""

import contextlib
import fcntl
import os
import secrets
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from graftwork import __version__
from graftwork.errors import UserError, one_line
from graftwork.files import STORE
from graftwork.learning_curve import (
    CANDIDATES,
    NAMES,
    STAGES,
    Cell,
    Stage,
    check_labels,
    chosen_sentence,
    curve_folder,
    find_savings,
    measure_cell,
    read_cell,
    summarise,
    write_curve,
)
from graftwork.pipelines.local import build_digest, end_stale_runs, process_name, stoppable, uninterrupted
from graftwork.tracking import CHECKPOINTS, Follower, Journal, dataset_input, shown_uri, source_tags, tracking_uri


def run_curve(
    parameters: dict[str, Any], sizes: list[int], seeds: list[int], output: Path, console: Console
) -> dict[str, Any]:
    """Measure every size with every seed, write ``output``/learning-curve-TIME and return what is in its ``curve.json``.

    Raises:
        UserError: the data holds fewer labels than asked, or a setting does not fit. KeyboardInterrupt: the user stopped it.
    """
    started = time.time()
    build = build_digest()
    cells = [Cell(size, seed) for size in sorted(sizes) for seed in seeds]
    cache = curve_folder(parameters, (output / ".cache").resolve(), build)
    name = f"learning-curve-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    folder = (output / name).resolve()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"output {one_line(output)}: cannot be written ({error.strerror}); give another with --output"
        ) from None
    os.environ.setdefault(CHECKPOINTS, str((output / ".cache" / "checkpoints").resolve()))
    os.environ.setdefault(STORE, str((output / ".cache" / "packs").resolve()))
    warnings.filterwarnings("ignore", message=".*deterministic.*")
    with only_one(cache, output), stoppable(), watched(console, cells) as (stage, say):
        notes = check_labels(parameters, cells, cache, stage)
        for note in notes:
            say(note)
        follower = follow(folder / "journals", output, name, parameters)
        try:
            found, new = [], 0
            for cell in cells:
                content = read_cell(cache, cell)
                reused = content is not None
                if content is None:
                    content = measure_cell(parameters, cell, cache, stage(cell))
                    new += 1
                stage(cell)("finished", 1, 1)
                for point in content["points"]:
                    journal(folder / "journals", point, content["dataset"], parameters["data"], reused)
                    how = "  reused" if reused else ""
                    say(
                        f"{point['per_class']:>6,} a class  seed {point['seed']}  {NAMES[point['candidate']]:<15}  "
                        f"{point['test_accuracy']:.4f}  {point['seconds']:7.1f} s{how}"
                    )
                found.append(content)
            with uninterrupted():
                points = [point for content in found for point in content["points"]]
                rows = summarise(points, parameters["confidence"])
                data = found[-1]["dataset"]
                curve = {
                    "format": "graftwork-learning-curve/1",
                    "run_id": name,
                    "data": {
                        "name": data["name"],
                        "source": parameters["data"],
                        "classes": sorted(data["counts"]["test"]),
                        "test": sum(data["counts"]["test"].values()),
                    },
                    "backbone": parameters["backbone"],
                    "image_size": parameters["image_size"],
                    "per_class": sorted(sizes),
                    "seeds": seeds,
                    "confidence": parameters["confidence"],
                    "savings": find_savings(points, rows),
                    "rows": rows,
                    "points": points,
                    "notes": notes,
                    "measured_now": new,
                    "parameters": parameters,
                    "build": build,
                    "graftwork": __version__,
                    "mlflow": {"tracking_uri": shown_uri(follower.uri), "experiment_id": "", "parent_run_id": ""},
                }
                write_curve(curve, folder)
                finish(follower, curve, folder)
        except BaseException as error:
            with uninterrupted():
                end(follower, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
                shutil.rmtree(folder, ignore_errors=True)  # what is worth keeping is in the cache
            if isinstance(error, MemoryError):
                raise UserError("out of memory; use a smaller batch_size, image_size or max_length") from None
            raise
    curve["seconds"] = time.time() - started
    return curve


@contextlib.contextmanager
def only_one(cache: Path, output: Path) -> Iterator[None]:
    """Hold the cells of this curve: two processes that measure the same would take each other's half-made files.

    Raises:
        UserError: another process has them.
    """
    with (cache / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a process that dies leaves no lock
        except BlockingIOError:
            where = one_line(output)
            raise UserError(
                f"output {where}: the same curve is being measured there; wait for it, or give another --output"
            ) from None
        yield


@contextlib.contextmanager
def watched(console: Console, cells: list[Cell]) -> Iterator[tuple[Callable[[Cell], Stage], Callable[[str], None]]]:
    """Yield (what makes a cell's progress function, what prints a line): a bar on a terminal, lines alone elsewhere."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    task = bar.add_task("", total=len(cells))

    def stage(cell: Cell) -> Stage:
        def progress(name: str, done: int, total: int) -> None:
            words = f"{cell.per_class:,} a class, seed {cell.seed}: {STAGES.get(name, 'evaluate')}"
            bar.update(task, description=words)
            if name != "data":  # packed for the largest sizes first, which are the last to be trained
                share = 1.0 if name == "finished" else (CANDIDATES.index(name) + done / max(total, 1)) / len(CANDIDATES)
                bar.update(task, completed=cells.index(cell) + share)

        return progress

    def say(text: str) -> None:
        console.print(f"  {escape(text)}", highlight=False, soft_wrap=True)

    with bar:
        yield stage, say


def print_curve(curve: dict[str, Any], output: Path, console: Console) -> None:
    """Print the table, the difference that choosing on validation makes, and what transfer saves."""
    table = Table(box=None, pad_edge=False)
    for heading in ("labels a class", *NAMES.values(), "chosen", "chosen − frozen"):
        table.add_column(heading, justify="right")
    for row in curve["rows"]:
        gain = row["chosen_minus_baseline"]
        table.add_row(
            f"{row['per_class']:,}",
            *(accuracy(one) for one in row["candidates"].values()),
            f"{gain['mean']:+.2f} points" + (f", worst {gain['worst']:+.2f}" if len(curve["seeds"]) > 1 else ""),
        )
    seconds = Table(box=None, pad_edge=False)
    for heading in ("labels a class", *(f"{name}, s" for name in NAMES.values())):
        seconds.add_column(heading, justify="right")
    for row in curve["rows"]:
        figures = (f"{row['candidates'][name]['seconds']:.1f}" for name in CANDIDATES)
        seconds.add_row(f"{row['per_class']:,}", *figures)
    how = "seeds and test examples" if len(curve["seeds"]) > 1 else "test examples of one seed"
    lines: list[Any] = [
        "",
        f"Test accuracy, with {curve['confidence']:.0%} intervals over {how}",
        table,
        "",
        seconds,
        "",
    ]
    lines += [escape(saved["sentence"]) for saved in curve["savings"].values()]
    lines.append(chosen_sentence(curve["rows"]))
    lines.append(
        f"Done in {curve['seconds']:.0f} s; {curve['measured_now']} of {len(curve['points']) // len(CANDIDATES)} "
        "sizes and seeds were measured now, the others earlier"
        if curve["measured_now"] < len(curve["points"]) // len(CANDIDATES)
        else f"Done in {curve['seconds']:.0f} s"
    )
    lines.append(f"Report: {escape(str(output / curve['run_id'] / 'report.html'))}")
    if "error" in curve["mlflow"]:
        where, why = escape(curve["mlflow"]["tracking_uri"]), escape(curve["mlflow"]["error"][:200])
        journals = escape(str(output / curve["run_id"] / "journals"))
        lines.append(f"[yellow]MLflow at {where} did not take everything ({why}); the journals are in {journals}[/]")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=isinstance(line, str))


def accuracy(one: dict[str, Any]) -> str:
    low, high = one["test_accuracy_interval"]
    return f"{one['test_accuracy']:.3f} ({low:.3f}–{high:.3f})"


# ---- MLflow --------------------------------------------------------------------------------------------------------------------


def follow(journals: Path, output: Path, name: str, parameters: dict[str, Any]) -> Follower:
    journals.mkdir(parents=True)
    tags = {
        "mlflow.source.name": "graftwork learning-curve",
        "mlflow.source.type": "LOCAL",
        "graftwork.run": name,
        "graftwork.backbone": str(parameters["backbone"]),
        "graftwork.process": process_name(os.getpid()),
        **source_tags(),
    }
    follower = Follower(journals, tracking_uri(output), output.resolve(), name, tags)
    follower.start()
    return follower


def journal(folder: Path, point: dict[str, Any], dataset: dict[str, Any], source: str, reused: bool) -> None:
    """Write the journal of one point, which becomes a child run; it lasted as long as its training took."""
    now = time.time()
    lines = Journal(folder, f"{point['candidate']}-{Cell(point['per_class'], point['seed'])}")
    lines.write("start", time=now - point["seconds"], pid=os.getpid())
    lines.params({k: point[k] for k in ("per_class", "seed", "candidate", "strategy")})
    lines.metrics({k: point[k] for k in ("test_accuracy", "test_macro_f1", "seconds", "val_accuracy")})
    lines.tags(
        {
            "graftwork.candidate": point["candidate"],
            "graftwork.dataset_digest": dataset["digest"],
            "graftwork.chosen": str(point["chosen"]).lower(),
            "graftwork.reused": str(reused).lower(),
        }
    )
    lines.dataset(dataset["name"], dataset["digest"], source, "training")
    lines.write("end", status="FINISHED")


def finish(follower: Follower, curve: dict[str, Any], folder: Path) -> None:
    """Put the curve on the parent run and end it. A server that is away costs the tracking, not the curve."""
    from graftwork.files import write_json

    follower.close(20)
    try:
        if not follower.parent_id:
            raise ConnectionError(follower.error or f"{shown_uri(follower.uri)} did not answer")
        client = follower.client()
        curve["mlflow"] |= {"experiment_id": follower.experiment_id, "parent_run_id": follower.parent_id}
        write_json(folder / "curve.json", curve)
        log_parent(client, follower.parent_id, curve, folder)
        end_stale_runs(follower)
        end_parent(follower, "FINISHED")
    except Exception as error:
        follower.error = follower.error or str(error)
    if follower.error:
        curve["mlflow"]["error"] = one_line(follower.error)
        write_json(folder / "curve.json", curve)
    else:
        shutil.rmtree(folder / "journals", ignore_errors=True)  # all of it is in MLflow


def log_parent(client: Any, run_id: str, curve: dict[str, Any], folder: Path) -> None:
    """Log parameters, the savings, and each candidate's mean accuracy with the labels a class as step, so that MLflow draws the curve."""
    from mlflow.entities import Metric, Param, RunTag

    now = int(time.time() * 1000)
    metrics = []
    for row in curve["rows"]:
        values = {f"{name}_accuracy": row["candidates"][name]["test_accuracy"] for name in (*CANDIDATES, "chosen")}
        values |= {f"{name}_seconds": row["candidates"][name]["seconds"] for name in CANDIDATES}
        values["chosen_minus_baseline_points"] = row["chosen_minus_baseline"]["mean"]
        metrics += [Metric(k, float(v), now, row["per_class"]) for k, v in values.items()]
    for name, saved in curve["savings"].items():
        for what in ("labels_factor", "time_factor"):
            if saved[what] is not None:
                metrics.append(Metric(f"{name}_{what}", float(saved[what]), now, 0))
    values = {**curve["parameters"], "per_class": curve["per_class"], "seeds": curve["seeds"]}
    params = [Param(k, str(v)[:6000]) for k, v in values.items() if k not in ("seed", "train_per_class")]
    note = "\n".join(f"- {saved['sentence']}" for saved in curve["savings"].values())
    tags = {"mlflow.note.content": note} | {
        f"graftwork.{name}_factors_are": saved["bound"] or "interpolated" for name, saved in curve["savings"].items()
    }
    for start in range(0, len(metrics), 500):
        client.log_batch(run_id, metrics=metrics[start : start + 500])
    for start in range(0, len(params), 90):
        client.log_batch(run_id, params=params[start : start + 90])
    client.log_batch(run_id, tags=[RunTag(k, v) for k, v in tags.items()])
    fingerprint = str(curve["parameters"]["source_fingerprint"])[:36]
    client.log_inputs(run_id, [dataset_input(curve["data"]["name"], fingerprint, curve["data"]["source"], "training")])
    for name in ("report.html", "curve.png", "curve.csv", "curve.json"):
        client.log_artifact(run_id, str(folder / name))


def end(follower: Follower, status: str) -> None:
    """Leave no run open of a curve that was not finished."""
    follower.close(10)
    with contextlib.suppress(Exception):  # a server that is away
        if follower.parent_id:
            end_parent(follower, status)


def end_parent(follower: Follower, status: str) -> None:
    # 'graftwork compare' lists the runs whose tag says "true": a curve has no candidate to compare with theirs.
    follower.client().set_tag(follower.parent_id, "graftwork.parent", "curve")
    follower.finish(status)
