"""The real command on bad input: one line that says what is wrong, where and what to do, and nothing half-made left behind."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from cases import (
    CASES,
    CLASSES,
    MODES,
    NAMES,
    STEPS,
    CannotTryError,
    Case,
    Result,
    World,
    marker,
    mlflow_statuses,
    stop_in,
    try_case,
)

pytestmark = pytest.mark.e2e
SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])


@pytest.fixture(scope="module")
def world(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("world"), weights)
    with made.stack:
        yield made


@pytest.fixture(scope="module")
def summary(world: World) -> dict:
    """The summary of a whole run over odd images, odd names, looping links and a few broken images."""
    return json.loads((world.good_folder / "summary.json").read_text(encoding="utf-8"))


def check_one_line(result: Result, *says: str) -> None:
    assert "Traceback" not in result.stdout + result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert [line for line in lines if line.startswith("graftwork:")] == lines, result.stderr
    assert len(lines) == 1, result.stderr
    for part in says:
        assert part in lines[0]


# ---- what must be refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_a_mistake_is_one_line_that_says_what_to_do(world: World, case: Case) -> None:
    """Else a user reads a stack trace, or a script goes on after a run that never was."""
    try:
        result = try_case(world, case).result
    except CannotTryError as reason:
        pytest.skip(str(reason))
    assert result.status == case.status, result
    check_one_line(result, *case.says)
    assert not marker(world).exists(), "the weights file was executed"


def test_a_refusal_leaves_nothing_in_the_output_folder(world: World, tmp_path: Path) -> None:
    """Else every typing mistake leaves a run's folder that a user has to tell from a real one."""
    result = world.command("run", "--data", str(tmp_path / "none"), "--output", str(tmp_path / "out"))
    assert result.status == 2
    assert not (tmp_path / "out").exists()


def test_predict_labels_the_good_images_beside_a_broken_one(world: World) -> None:
    """Else one bad photo in a folder of thousands costs all the labels."""
    case = next(c for c in CASES if "among good ones" in c.name)
    result = try_case(world, case).result
    assert result.stdout.count("0.png") == 2


# ---- what must work ------------------------------------------------------------------------------------------------------------


def test_a_run_over_odd_images_ends_well(world: World) -> None:
    """Else a user with one palette PNG or a quote in a folder's name cannot train at all."""
    assert world.good.status == 0, world.good
    assert "Traceback" not in world.good.stdout + world.good.stderr
    assert not world.good.stderr.strip()


def manifest_sources(world: World) -> dict[str, tuple[int, int]]:
    from graftwork.dataset import open_dataset

    folder = json.loads((world.good_folder / "summary.json").read_text(encoding="utf-8"))["files"]["dataset"]
    rows = open_dataset(folder).manifest.to_pylist()
    assert len({row["source"] for row in rows}) == len(rows), "an image was counted twice"
    return {row["source"]: (row["width"], row["height"]) for row in rows}


@pytest.mark.parametrize("name", MODES)
def test_images_of_every_mode_are_used(world: World, name: str) -> None:
    """Else CMYK, 16-bit, palette or transparent images are silently missing from the training set."""
    assert f"plain/{name}" in manifest_sources(world)


def test_a_rotated_photo_is_stood_upright(world: World) -> None:
    """Else every photo of a phone held upright is learned lying on its side."""
    assert manifest_sources(world)["plain/rotated.jpg"] == (40, 48)


@pytest.mark.parametrize("name", NAMES)
def test_files_of_every_name_are_used(world: World, name: str) -> None:
    """Else an image is lost for a space, a quote or a line break in its name."""
    assert f"two words/{name}" in manifest_sources(world)


def test_classes_of_every_name_are_learned(summary: dict) -> None:
    """Else a class is lost, or renamed, for what is in its folder's name."""
    assert sorted(summary["data"]["classes"]) == sorted(CLASSES)


def test_looping_links_are_walked_once(world: World) -> None:
    """Else a link that leads upwards makes the run endless, or each image counted many times."""
    assert not any("up/" in source or "again/" in source for source in manifest_sources(world))


def test_broken_images_below_the_share_are_counted_and_listed(world: World, summary: dict) -> None:
    """Else a user never learns that images were left out, nor which."""
    assert summary["data"]["broken"] == len(world.broken)
    page = (world.good_folder / "validation.html").read_text(encoding="utf-8")
    for name in world.broken:
        assert f"plain/{name}" in page
    assert f"{len(world.broken)} images cannot be decoded and are left out" in world.good.stdout


def test_the_validation_page_of_a_stopped_run_lists_the_broken_images(world: World) -> None:
    """Else the one line's five examples are all that a user gets to mend a thousand images."""
    case = next(c for c in CASES if c.name == "more broken images than the share")
    (folder,) = try_case(world, case).folders
    page = next(folder.rglob("validation.html")).read_text(encoding="utf-8")
    for name in world.broken:
        assert f"plain/{name}" in page


# ---- stopping ------------------------------------------------------------------------------------------------------------------


def check_stopped(world: World, step: str, number: signal.Signals, group: bool = False) -> None:
    stopped = stop_in(world, step, number, group)
    assert stopped.result.status == 130, stopped.result
    check_one_line(stopped.result, "stopped")
    assert stopped.alive == []
    assert stopped.left == []
    parent, nested = mlflow_statuses(world, stopped.folder)
    assert parent == "KILLED"
    assert step in nested
    assert set(nested.values()) <= {"KILLED", "FINISHED"}, nested


@pytest.mark.parametrize("step", STEPS)
@SIGNALS
def test_a_run_can_be_stopped_in_every_step(world: World, step: str, number: signal.Signals) -> None:
    """Else a stopped run goes on in the background, is shown as running for ever, or leaves files that look finished."""
    check_stopped(world, step, number)


def test_ctrl_c_in_a_terminal_stops_the_whole_group(world: World) -> None:
    """Else Ctrl-C, which a terminal sends to every process of the run at once, prints a stack trace a process."""
    check_stopped(world, "fine_tune", signal.SIGINT, group=True)


@SIGNALS
def test_a_run_stopped_while_it_is_written_up_is_not_left_running(world: World, number: signal.Signals) -> None:
    """Else a Ctrl-C in the last second leaves a run that is shown as running for ever."""
    stopped = stop_in(world, "register_model", number, until="validation.html")
    assert "Traceback" not in stopped.result.stdout + stopped.result.stderr
    parent, nested = mlflow_statuses(world, stopped.folder)
    assert (stopped.result.status, parent) in ((0, "FINISHED"), (130, "KILLED")), stopped.result
    assert set(nested.values()) <= {"KILLED", "FINISHED"}, nested


def test_the_next_run_ends_what_kill_9_left_running(world: World) -> None:
    """Else every power cut leaves runs that MLflow shows as running for ever."""
    killed = stop_in(world, "fine_tune", signal.SIGKILL, tracked=True)
    assert killed.result.status == -signal.SIGKILL
    assert mlflow_statuses(world, killed.folder)[0] == "RUNNING"
    following = world.command(*world.good_command)
    assert following.status == 0, following
    parent, nested = mlflow_statuses(world, killed.folder)
    assert parent == "KILLED"
    assert "RUNNING" not in nested.values()
