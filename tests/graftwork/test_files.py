"""Files: nothing half-made is taken for finished, and nothing finished is lost to something half-made."""

import json
from pathlib import Path

import pytest

from graftwork.files import finished_folder, write_json, write_text


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_folder_appears_whole_and_only_at_the_end(tmp_path: Path) -> None:
    """A user's next step could start on a dataset that is still being written."""
    target = tmp_path / "deep" / "data"
    with finished_folder(target) as partial:
        (partial / "a.txt").write_text("a")
        assert not target.exists()
        assert partial.parent == target.parent  # the same file system: a rename cannot stop half-way
    assert names(target) == ["a.txt"] and names(target.parent) == ["data"]


@pytest.mark.parametrize(
    "error", [OSError("disk full"), KeyboardInterrupt(), SystemExit(1)], ids=lambda e: type(e).__name__
)
def test_a_failure_leaves_nothing_at_the_name_and_nothing_beside_it(tmp_path: Path, error: BaseException) -> None:
    """A user would find half a dataset that looks finished, or a disk that fills with leavings."""
    with pytest.raises(type(error)), finished_folder(tmp_path / "data") as partial:
        (partial / "a.txt").write_text("a")
        raise error
    assert names(tmp_path) == []


def test_a_failure_keeps_what_was_there(tmp_path: Path) -> None:
    """A user's good dataset would be gone after a second try that failed."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "old.txt").write_text("old")
    with pytest.raises(ValueError), finished_folder(tmp_path / "data") as partial:
        (partial / "new.txt").write_text("new")
        raise ValueError
    assert names(tmp_path / "data") == ["old.txt"] and names(tmp_path) == ["data"]


@pytest.mark.parametrize("before", ["empty", "full"])
def test_a_retry_replaces_the_folder_that_is_there(tmp_path: Path, before: str) -> None:
    """A user's retried step would fail, or mix its files with those of the first try."""
    (tmp_path / "data").mkdir()
    if before == "full":
        (tmp_path / "data" / "old.txt").write_text("old")
    with finished_folder(tmp_path / "data") as partial:
        (partial / "new.txt").write_text("new")
    assert names(tmp_path / "data") == ["new.txt"] and names(tmp_path) == ["data"]


def test_leavings_of_a_killed_process_do_not_get_in(tmp_path: Path) -> None:
    """A user whose machine lost power would get files of the lost run in the next one's dataset."""
    with finished_folder(tmp_path / "data") as first:
        name = first.name
    (tmp_path / name).mkdir()
    (tmp_path / name / "stale.txt").write_text("stale")
    with finished_folder(tmp_path / "data") as partial:
        assert names(partial) == []
    assert names(tmp_path) == ["data"]


def test_text_is_written_in_one_step_with_its_folders(tmp_path: Path) -> None:
    """A user's report would be missing for want of a folder, or hold another encoding than it says."""
    write_text(tmp_path / "a" / "b" / "page.html", "é 中 🙂\n")
    assert (tmp_path / "a" / "b" / "page.html").read_bytes() == "é 中 🙂\n".encode()
    assert names(tmp_path / "a" / "b") == ["page.html"]


def test_text_that_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    """A user's summary of the last good run would be cut to nothing by one that failed."""
    write_text(tmp_path / "x.txt", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "x.txt", "new" * 5000 + "\udce9")
    assert (tmp_path / "x.txt").read_text() == "old" and names(tmp_path) == ["x.txt"]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_json_refuses_numbers_that_are_no_json(tmp_path: Path, number: float) -> None:
    """A user's jq, browser or Kubeflow would refuse a file that Python alone can read."""
    write_json(tmp_path / "x.json", {"loss": 1.0})
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", {"loss": number})
    assert json.loads((tmp_path / "x.json").read_text()) == {"loss": 1.0} and names(tmp_path) == ["x.json"]


def test_json_comes_back_as_it_went(tmp_path: Path) -> None:
    """A user's class names would be unreadable in the files, or changed by them."""
    content = {"classes": ["café", "中", 'a "b"\n\\'], "n": [1, 2.5, None, True]}
    write_json(tmp_path / "x.json", content)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == content and "café" in text and text.endswith("}\n")
