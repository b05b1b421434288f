"""Bad data through the real command: one clear line, the right exit status, the good images beside the bad ones, and nothing half-made."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3_server
from data_corpus import BYTES_OF_MEMORY, CASES, CannotTryError, Case, Tried, try_case

from graftwork.dataset import open_dataset
from graftwork.images import decode


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3_server.Server]:
    with s3_server.serve(tmp_path_factory.mktemp("s3")) as running:
        yield running


def test_the_cases_are_told_apart() -> None:
    """A user of the table could not tell which of two cases of one name an answer belongs to."""
    assert len({case.name for case in CASES}) == len(CASES) >= 80


@pytest.mark.parametrize("case", CASES, ids=lambda case: re.sub(r"\W+", "-", case.name))
def test_bad_data(case: Case, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A user would read a stack trace, lose good images beside a bad one, train on bad data, or find something half-made later."""
    server = request.getfixturevalue("server") if case.server else None
    try:
        tried = try_case(case, tmp_path, server)
    except CannotTryError as reason:
        pytest.skip(str(reason))
    check_printed(case, tried)
    assert tried.changed == []
    assert tried.memory < BYTES_OF_MEMORY
    if case.images < 0:
        assert not tried.kept.exists()
    else:
        check_kept(case, tried.kept)


def check_printed(case: Case, tried: Tried) -> None:
    printed = tried.stdout + tried.stderr
    assert "Traceback" not in printed
    assert tried.status == case.status, printed
    for pattern in case.says:
        assert re.search(pattern, printed, re.MULTILINE), f"{pattern!r} is not in:\n{printed}"
    lines = tried.stderr.splitlines()
    # What is found in data is said on stdout; what keeps the command from its work, in one line on stderr.
    judged = re.search("^(not )?good to train on", tried.stdout, re.MULTILINE)
    assert len(lines) == (0 if judged else 1), tried.stderr
    assert all(line.startswith("graftwork: ") for line in lines), tried.stderr
    assert all(line.isprintable() for line in printed.splitlines()), printed


def check_kept(case: Case, kept: Path) -> None:
    """The dataset is whole: what was left out is listed with the reason, and every example can be read and decoded."""
    dataset = open_dataset(kept)
    broken = {b["source"]: b["reason"] for b in dataset.info["broken"]}
    usable = set(case.either) - broken.keys()
    assert len(dataset.manifest) == case.images + len(usable)
    if "*" in case.broken:
        assert all(re.search(case.broken["*"], reason) for reason in broken.values())
    else:
        assert broken.keys() - set(case.either) == case.broken.keys()
        for source, pattern in case.broken.items():
            assert re.search(pattern, broken[source]), broken
    rows = dataset.manifest.to_pylist()
    for row, data in zip(rows, dataset.read(dataset.manifest), strict=True):
        assert hashlib.sha256(data).hexdigest() == row["sha256"] or row["length"] != row["bytes"]
        assert decode(data).size == (row["width"], row["height"]) or row["length"] != row["bytes"]
    sizes = {row["source"]: (row["width"], row["height"]) for row in rows}
    assert {source: sizes[source] for source in case.sizes} == case.sizes
