"""Texts for labels: from the command line, from files and tables, to the pyfunc; every way gives what the training would have seen."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers", reason="pip install 'graftwork[text]'")

from text_networks import make_model

from graftwork import text_inputs
from graftwork.errors import UserError
from graftwork.exporting import export_onnx
from graftwork.model import load_model, predict
from graftwork.predicting import find_examples, label_examples, loaded, table_writer

TEXTS = [
    "the film was good",
    "bad",
    "a film that nobody wanted and nobody saw , bad as it was",
    'great , "great" actor',
]


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("text model"))


@pytest.fixture(scope="module")
def model(text_model: Path):
    return load_model(text_model, "cpu")


def contents(*inputs: object, column: str = "") -> list[str]:
    found = find_examples([str(i) for i in inputs], "text", column)
    return [item.content.read().decode() for part in found.parts for item in part.items]


def test_a_sentence_a_file_and_a_folder(tmp_path: Path, model) -> None:
    """Labels would be given to a path, or to a part of what was asked."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text(" the film was good\n")
    (tmp_path / "deep" / "b.txt").write_bytes("\ufeffbad".encode("utf-16-le"))
    (tmp_path / "deep" / "c.txt").write_bytes("caf\xe9".encode("cp1252"))
    (tmp_path / "deep" / "photo.jpg").write_bytes(b"none")
    (tmp_path / "empty.txt").write_text(" \n")
    found = find_examples(["bad and/or boring.", str(tmp_path), "/ that is 3.5", "a:b"], "text")
    assert found.number == 7
    read = list(loaded(found.parts, model.preprocess, text_inputs))
    inside = [str(tmp_path / name) for name in ("a.txt", "empty.txt", "deep/b.txt", "deep/c.txt")]
    assert [one.name for one in read] == ["", *inside, "", ""]
    assert [one.text for one in read] == [
        "bad and/or boring.", "the film was good", "", "bad", "café", "/ that is 3.5", "a:b",
    ]  # fmt: skip
    assert read[2].example == "empty text"
    for bad in ("gone.txt", "no/such.csv", "./gone", "/gone/file", "photo.jpg", "gone.jsonl.gz"):
        with pytest.raises(UserError, match="no such file; check the path"):
            find_examples([bad], "text")
    for bad in ("", " ", "x" * 1_000_001, "\udcff"):
        with pytest.raises(UserError, match="give a text, a file or a folder"):
            find_examples([bad], "text")
    (tmp_path / "pictures").mkdir()
    with pytest.raises(UserError, match=r"holds no texts \(\.text, \.txt\)"):
        find_examples([str(tmp_path / "pictures")], "text")


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "jsonl"])
def test_tables_without_labels(kind: str, tmp_path: Path) -> None:
    """Whoever asks for labels has none; a row that is taken for another gets that one's label."""
    import pandas as pd

    file = tmp_path / f"rows.{kind}"
    table = pd.DataFrame({"id": range(4), "Review": TEXTS, "mine": TEXTS[::-1]})
    if kind == "parquet":
        table.to_parquet(file)
    elif kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n\n" for row in table.to_dict("records")))
    else:
        table.to_csv(file, index=False, sep="\t" if kind == "tsv" else ",")
    assert contents(file) == TEXTS
    assert contents(file, column="mine") == TEXTS[::-1]
    with pytest.raises(
        UserError, match="no column 'gone' among the columns found: 'id', 'Review', 'mine'; check --col"
    ):
        contents(file, column="gone")


def test_a_table_that_does_not_say_which_is_told_so(tmp_path: Path) -> None:
    """The wrong column of two would be labelled."""
    (tmp_path / "two.csv").write_text("text,comment\na,b\n")
    with pytest.raises(UserError, match="2 columns could be the text: text, comment; keep one, or say which"):
        contents(tmp_path / "two.csv")
    assert contents(tmp_path / "two.csv", column="comment") == ["b"]
    (tmp_path / "none.csv").write_text("words\na\n")
    with pytest.raises(UserError, match=r"no column for the text \(text, sentence, .*or give --column"):
        contents(tmp_path / "none.csv")
    (tmp_path / "list.jsonl").write_text('{"text": "a"}\n{"text": ["b"]}\n')
    with pytest.raises(UserError, match="line 2: 'text', the column for the text, holds a list"):
        contents(tmp_path / "list.jsonl")


def test_labels_are_the_models_own(tmp_path: Path, model) -> None:
    """Texts are put in order by length on their way through the network: labels would be another text's."""
    random = np.random.default_rng(1)
    words = ["the", "a", "film", "was", "good", "bad", "great", "boring", ",", "."]
    texts = [" ".join(random.choice(words, random.integers(1, 40))) for _ in range(700)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in [*texts[:350], "", *texts[350:]]))
    broken: list[tuple[str, str]] = []
    found = find_examples([str(tmp_path / "t.jsonl"), "the film was good"], "text")
    rows = list(label_examples(model, found, lambda *one: broken.append(one)))
    assert broken == [(f"{tmp_path}/t.jsonl line 351", "empty text")]
    assert [t for r in rows for t in r.texts] == [*texts, "the film was good"]
    alone = np.concatenate([predict(model, [model.preprocess.example(t.encode())]) for t in texts])
    together = np.concatenate([r.probabilities for r in rows])
    assert alone.std(0).min() > 0.01, "all texts look alike to this network: the test shows nothing"
    np.testing.assert_allclose(together[:-1], alone, atol=1e-4)
    with table_writer(tmp_path / "out.csv", model.classes, headings=text_inputs.HEADINGS) as write:
        for part in rows:
            write(part)
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        read = list(csv.reader(file))
    assert read[0] == ["input", "text", "label", "p_bad", "p_good", "p_none"]
    assert read[1][:2] == [f"{tmp_path}/t.jsonl line 1", texts[0]] and read[-1][:2] == ["", "the film was good"]
    assert [row[2] for row in read[1:-1]] == [model.classes[n] for n in alone.argmax(1)]


def test_the_pyfunc_takes_texts(model) -> None:
    """The registered model would give labels for the wrong column, or for paths."""
    import pandas as pd

    from graftwork.predictor import Predictor

    predictor = Predictor()
    predictor.model = model
    wanted = predict(model, [model.preprocess.example(t.encode()) for t in TEXTS])
    columns = ["p_bad", "p_good", "p_none"]
    for given in (
        TEXTS,
        pd.DataFrame({"id": ["x"] * 4, "text": TEXTS}),
        pd.DataFrame({"review": TEXTS}),
        pd.Series(TEXTS),
        np.array(TEXTS),
        [f" {t}\n".encode() for t in TEXTS],
    ):
        found = predictor.predict(None, given)
        assert list(found) == ["label", *columns]
        np.testing.assert_allclose(found[columns].to_numpy(), wanted, atol=1e-5)
    for given, words in (
        (["good", ""], "input 1: empty text"),
        (["good", None], "input 1: is a NoneType; give a text"),
        (pd.DataFrame({"id": ["1"], "review": ["good"]}), r"no column is called 'text' \(id, review\)"),
    ):
        with pytest.raises(UserError, match=words):
            predictor.predict(None, given)


def test_the_registered_model_is_told_its_column(text_model: Path, model, tmp_path: Path) -> None:
    """MLflow refuses what the signature does not say, and a card's sample that fails is the first thing that a user sees."""
    import mlflow
    import pandas as pd

    from graftwork.register import signature

    mlflow.pyfunc.save_model(
        tmp_path / "saved",
        python_model=str(Path(text_inputs.__file__).with_name("predictor.py")),
        artifacts={"model": str(text_model)},
        signature=signature(model.info),
        input_example=text_inputs.example_table(),
    )
    saved = mlflow.pyfunc.load_model(str(tmp_path / "saved"))
    assert saved.metadata.get_input_schema().input_names() == ["text"]
    wanted = predict(model, [model.preprocess.example(t.encode()) for t in TEXTS])
    found = saved.predict(pd.DataFrame({"text": TEXTS}))
    np.testing.assert_allclose(found.iloc[:, 1:].to_numpy(), wanted, atol=1e-5)
    sample = eval(f'pd.DataFrame({{"{text_inputs.COLUMN}": {text_inputs.USE}}})', {"pd": pd})  # as the card shows it
    assert saved.predict(sample)["label"].isin(model.classes).all()
    with pytest.raises(mlflow.exceptions.MlflowException):
        saved.predict(pd.DataFrame({"image": TEXTS}))


def test_an_export_that_cannot_be_is_one_line(text_model: Path, tmp_path: Path) -> None:
    """A trace after a minute of export tells nobody what to do instead."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    with pytest.raises(UserError, match="for texts cannot be exported to ONNX as yet; `graftwork serve` answers"):
        export_onnx(text_model, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
