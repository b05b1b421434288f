"""``graftwork data``: what it prints, its exit status, and the files it leaves."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from graftwork.pipelines import cli


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "photos"
    random = np.random.default_rng(0)
    for label in ("ant", "bee"):
        (root / label).mkdir(parents=True)
        for n in range(20):
            Image.fromarray(random.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(root / label / f"{n}.png")
    return root


def graftwork(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run the command in this process; return its exit status and what it printed."""
    before, sys.argv = sys.argv, ["graftwork", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        sys.argv = before
    printed = capsys.readouterr()
    return int(ended.value.code or 0), " ".join((printed.out + printed.err).split())


def test_inspect_leaves_what_was_asked_for_and_nothing_else(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user's CI would find no page, or fill with datasets."""
    monkeypatch.chdir(tmp_path)
    status, printed = graftwork("data", "inspect", photos, capsys=capsys)
    assert status == 0 and "good to train on" in printed and list(tmp_path.iterdir()) == []
    options = ("--report", "page.html", "--json", "found.json", "--keep", "kept")
    status, printed = graftwork("data", "inspect", photos, *options, capsys=capsys)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["found.json", "kept", "page.html"]
    found = json.loads(Path("found.json").read_text(encoding="utf-8"))
    assert found["digest"] in printed and found["digest"] in Path("page.html").read_text(encoding="utf-8")
    assert found["digest"] == json.loads(Path("kept/dataset.json").read_text(encoding="utf-8"))["digest"]


def test_a_critical_finding_is_exit_status_1(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user's CI would pass data whose test set was trained on."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        shutil.copytree(photos, tmp_path / "leak" / split)
    status, printed = graftwork("data", "inspect", "leak", capsys=capsys)
    assert status == 1 and "critical content_in_one_split: 80 images" in printed and "not good to train on" in printed
    suite = tmp_path / "suite.yaml"
    suite.write_text("rules: {content_in_one_split: warning}")
    status, printed = graftwork("data", "inspect", "leak", "--suite", suite, capsys=capsys)
    assert status == 0 and "warning content_in_one_split" in printed


def test_drift_is_judged_against_a_kept_dataset(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user could not compare this month's data with last month's without training on it."""
    monkeypatch.chdir(tmp_path)
    graftwork("data", "inspect", photos, "--keep", "before", capsys=capsys)
    shutil.copytree(photos, tmp_path / "dark")
    for path in (tmp_path / "dark").rglob("*.png"):
        Image.open(path).point(lambda v: v // 4).save(path)
    status, printed = graftwork("data", "inspect", "dark", "--set", "reference=before", capsys=capsys)
    assert status == 0 and "drift_brightness" in printed and "drift_side" not in printed
    status, printed = graftwork("data", "inspect", "dark", "--set", "classes=ant,bee,cow", capsys=capsys)
    assert status == 1 and "there is no image of cow" in printed


def test_diff_says_what_changed(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user whose model got worse could not see what became of the data."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(photos, tmp_path / "new")
    (tmp_path / "new/ant/0.png").unlink()
    (tmp_path / "new/ant/1.png").rename(tmp_path / "new/bee/from ant.png")
    Image.new("RGB", (40, 40), "red").save(tmp_path / "new/bee/red.png")
    graftwork("data", "inspect", photos, "--keep", "a", capsys=capsys)
    graftwork("data", "inspect", "new", "--keep", "b", capsys=capsys)
    status, printed = graftwork("data", "diff", "a", "b", capsys=capsys)
    assert status == 1
    assert "1 added, 1 removed, 0 moved to another split, 1 with another label, 38 as they were" in printed
    status, printed = graftwork("data", "diff", "a", "a", capsys=capsys)
    assert status == 0 and "The same contents, labels and splits." in printed
    run = tmp_path / "runs" / "20260101-000000-abcd"
    run.mkdir(parents=True)
    (run / "summary.json").write_text(json.dumps({"files": {"dataset": str(tmp_path / "b")}}))
    status, printed = graftwork("data", "diff", "a", "20260101-000000-abcd", capsys=capsys)
    assert status == 1 and "1 with another label" in printed
    status, printed = graftwork("data", "diff", "a", "nowhere", capsys=capsys)
    assert status == 2 and "there is no Dataset folder and no finished run of that name" in printed
