"""What a text is like: every text is packed as it is or told why not, and what is wrong with a set of texts is found."""

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

for _package in ("datasketch", "ftfy"):
    pytest.importorskip(_package, reason="pip install 'graftwork[text]'")

from graftwork import drift, text_looks  # noqa: E402
from graftwork.dataset import Dataset, open_dataset  # noqa: E402
from graftwork.ingest import ingest  # noqa: E402
from graftwork.modality import Looked  # noqa: E402
from graftwork.settings import IngestSettings, ValidateSettings  # noqa: E402
from graftwork.slices import slice_scores  # noqa: E402
from graftwork.sources.record import File, Record  # noqa: E402
from graftwork.validate import validate  # noqa: E402

TOPICS = ("fruit", "tools")


def gibberish(of: str) -> str:
    """Return words of which no two calls have any in common."""
    digest = hashlib.sha256(of.encode()).hexdigest().translate(str.maketrans("0123456789", "ghijklmnop"))
    return " ".join(digest[n : n + 6] for n in range(0, 60, 6))


class Texts:
    """A source of texts in files."""

    name, readers, modality = "texts", 2, "text"

    def __init__(self, rows: list[tuple[str, str, str, bytes]], folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.rows = []
        for key, label, split, data in rows:
            path = folder / key
            path.write_bytes(data)
            self.rows.append(Record(key, label, split, File(path)))

    def fingerprint(self) -> str:
        return "texts"

    def records(self) -> Iterator[Record]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def skipped(self) -> dict[str, int]:
        return {}


def rows(extra: list[tuple[str, str, str, bytes]] = [], each: int = 8) -> list[tuple[str, str, str, bytes]]:  # noqa: B006
    usual = [
        (f"{label}-{split}-{n}.txt", label, split, f"{label} {gibberish(f'{label} {split} {n}')}".encode())
        for label in TOPICS
        for split in ("train", "val", "test")
        for n in range(each)
    ]
    return usual + extra


def packed(folder: Path, extra: list[tuple[str, str, str, bytes]] = [], **settings) -> Dataset:  # noqa: B006
    ingest(IngestSettings(data="texts", **settings), folder / "dataset", source=Texts(rows(extra), folder / "source"))
    return open_dataset(folder / "dataset")


def look(data: bytes, most: int = 1000) -> Looked | str:
    return text_looks.Reader(most).look([data])[0]


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "שלום עולם",
        "日本語",
        "a 🤖 astral",
        "e\u0301 combined",
        "line\nbreak\ttab",
        "\u202eright to left",
        " blanks ",
    ],
)
def test_texts_are_packed_as_they_are(text: str, tmp_path: Path) -> None:
    """A text that is normalised, trimmed or turned on the way is not hers any more."""
    data = packed(tmp_path, [("own.txt", "fruit", "train", text.encode())])
    row = data.manifest.filter([source == "own.txt" for source in data.manifest["source"].to_pylist()])
    assert next(data.read(row)) == text.encode()
    assert row["width"][0].as_py() == len(text) and row["mode"][0].as_py() == "utf-8"
    assert data.info["modality"] == "text"


@pytest.mark.parametrize(
    ("data", "mode"),
    [
        (b"\xef\xbb\xbfna\xc3\xafve", "utf-8-sig"),
        ("naïve".encode("utf-16"), "utf-16"),
        (b"\xfe\xff" + "naïve".encode("utf-16-be"), "utf-16"),
        ("naïve".encode("cp1252"), "cp1252"),
    ],
)
def test_other_encodings_become_utf8(data: bytes, mode: str) -> None:
    """The network's tokenizer reads UTF-8 alone; a byte order mark would be a letter of the first word."""
    found = look(data)
    assert isinstance(found, Looked) and found.mode == mode and (found.scaled or data) == "naïve".encode()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty text"),
        (b" \n\t\xc2\xa0", "empty text"),
        (b"a\0b", "NUL"),
        (b"\xff\xfea", "not UTF-16"),
        (b"\xef\xbb\xbf\xff", "not UTF-8"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "not text"),
        (b"\x81\x8d\x8f\xff", "not text"),
        (b"x" * 1001, "longer than 1,000"),
        (b"x" * 10_000, "longer than 1,000"),
    ],
)
def test_what_is_no_text_is_told(data: bytes, reason: str) -> None:
    """A picture named .txt, or a file that was cut off, would be trained on as noise."""
    found = look(data)
    assert isinstance(found, str) and reason in found


def test_a_clean_set_passes(tmp_path: Path) -> None:
    """Rules that cry wolf are switched off."""
    result = validate(packed(tmp_path), ValidateSettings(reference="none"))
    assert not result.critical
    assert [r["rule"] for r in result.summary["rules"] if not r["passed"]] == []


PLANTED = {
    "mojibake": [("m.txt", "fruit", "train", "the cafÃ© has crÃ¨me brÃ»lÃ©e".encode())],
    "replaced": [("r.txt", "fruit", "train", "the caf\ufffd has cr\ufffdme".encode())],
    "encoding": [("e.txt", "fruit", "train", "the café has crème".encode("cp1252"))],
    "short": [("s.txt", "fruit", "train", b"a")],
    "long": [("l.txt", "fruit", "train", b"word " * 3000)],
    "all_decodable": [("b.txt", "fruit", "train", b"a\0b")],
    "content_has_one_label": [
        ("c1.txt", "fruit", "train", b"a text that stands under two labels"),
        ("c2.txt", "tools", "train", b"a text that stands under two labels"),
    ],
    "content_in_one_split": [
        ("d1.txt", "fruit", "train", b"a text that is in the training and in the test"),
        ("d2.txt", "fruit", "test", b"a text that is in the training and in the test"),
    ],
    "near_duplicates_across_splits": [
        ("n1.txt", "fruit", "train", b"The quick brown fox jumps over the lazy dog, and then it sleeps in the sun."),
        ("n2.txt", "fruit", "test", b"the quick brown fox  jumps over the lazy dog, and then it sleeps in the sun!"),
    ],
}


@pytest.mark.parametrize("rule", PLANTED)
def test_what_is_planted_is_found(rule: str, tmp_path: Path) -> None:
    """Each of these makes a figure that is too good, or a model that is too bad, and nobody would know why."""
    result = validate(packed(tmp_path, PLANTED[rule]), ValidateSettings(reference="none"))
    failed = {r["rule"]: r for r in result.summary["rules"] if not r["passed"]}
    assert set(failed) == {rule}
    assert any(PLANTED[rule][0][0] in name for name in failed[rule]["examples"]) or failed[rule]["count"]
    assert "image" not in failed[rule]["message"]


def test_the_page_shows_texts_and_nothing_of_them_is_markup(tmp_path: Path) -> None:
    """The page is opened in a browser: what is in a text must not run there."""
    evil = b"<script>alert(1)</script> the caf\xc3\x83\xc2\xa9 is closed"
    result = validate(packed(tmp_path, [("x.txt", "fruit", "train", evil)]), ValidateSettings(reference="none"))
    assert "<script>alert(1)" not in result.html and "&lt;script&gt;alert(1)" in result.html
    assert "Length, characters" in result.html


def test_sentences_of_other_topics_are_no_duplicates() -> None:
    """A false alarm in every set of short texts would hide the true ones."""
    pytest.importorskip("chatterbot_corpus", reason="pip install chatterbot-corpus")
    from graftwork.sources import open_source

    texts = [record.content.read().decode() for record in open_source("chatterbot-topics").records()]
    reader = text_looks.Reader(10_000)
    hashes = np.stack([np.frombuffer(reader.minhash(text), np.uint32) for text in texts])
    alike = [
        (texts[a], texts[b])
        for a in range(0, len(texts), 7)
        for b in np.flatnonzero((hashes == hashes[a]).mean(1) >= text_looks.SIMILAR)
        if a != b
    ]
    sets = [(text_looks.shingles(a), text_looks.shingles(b)) for a, b in alike]
    assert all(len(a & b) / len(a | b) > 0.6 for a, b in sets), (
        "what is called nearly equal has most of its letters in common"
    )
    assert len(alike) < 0.05 * len(texts)


def test_twenty_thousand_texts_are_compared_in_seconds(tmp_path: Path) -> None:
    """Comparing each with each would take a day."""
    words = np.random.default_rng(0).integers(0, 5000, (20_000, 12))
    reader = text_looks.Reader(10_000)
    began = time.perf_counter()
    texts = [" ".join(f"w{n}" for n in row) for row in words]
    minhashes = np.frombuffer(b"".join(reader.minhash(text) for text in texts), np.uint8).reshape(len(texts), -1).copy()
    minhashes[1] = minhashes[0]

    class Packed:
        def signature_bytes(self, widths: dict[str, int]) -> dict[str, np.ndarray]:
            assert widths == {"minhash": minhashes.shape[1]}
            return {"minhash": minhashes}

    split, content = np.arange(len(texts)) % 2, np.arange(len(texts))
    found, partners = text_looks.near_duplicates(Packed(), split, content)  # type: ignore[arg-type]
    assert found.tolist() == [0, 1] and partners.tolist() == [1, 0]
    assert time.perf_counter() - began < 120


def test_drift_of_lengths_is_seen_and_another_kind_of_data_is_told(tmp_path: Path) -> None:
    """Last month's reviews were two lines, this month's are two pages: the model was never tested on them."""
    before = drift.profile(packed(tmp_path))
    assert before["modality"] == "text" and set(before["texts"]) == set(text_looks.EDGES)
    (tmp_path / "p.json").write_text(json.dumps(before))
    assert drift.read_profile(str(tmp_path / "p.json")) == before
    (tmp_path / "later").mkdir()
    longer = [(f"new{n}.txt", "fruit", "train", f"{n} {n * 31} ".encode() * (200 + n)) for n in range(60)]
    now = packed(tmp_path / "later", longer)
    warnings = validate(now, ValidateSettings(), before).warnings
    assert any("lengths of the texts have shifted" in warning for warning in warnings)
    images = {"format": drift.FORMAT, "digest": "x", "classes": {"a": 1, "b": 1}, "images": {}}
    assert any("data of another kind" in warning for warning in validate(now, ValidateSettings(), images).warnings)


def test_texts_are_sliced_by_their_length(tmp_path: Path) -> None:
    """A model that fails on long texts alone has a good figure on the whole."""
    extra = [(f"long{n}.txt", "fruit", "test", f"{n} {n * 31} ".encode() * (50 + n)) for n in range(60)]
    data = packed(tmp_path, extra)
    test = data.split("test")
    targets = data.targets(test)
    wrong = np.array([characters > 200 for characters in test["width"].to_pylist()])
    found = slice_scores(data, test, targets, np.where(wrong, 1 - targets, targets), [])
    assert {"characters", "words"} & {one["column"] for one in found if one["worse"]}


def test_the_same_texts_make_the_same_dataset(tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    one, other = packed(tmp_path), packed(tmp_path / "again")
    assert one.digest == other.digest and one.manifest.equals(other.manifest)
    assert one.signatures().equals(other.signatures())
