"""The service of a text model, over real sockets: every form is answered as the pyfunc answers, and what is no text is refused."""

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("transformers", reason="pip install 'graftwork[text]'")

from test_serving import Running, start, stop
from text_networks import make_model

from graftwork.model import load_model, predict

WORDS = ["the", "a", "film", "was", "good", "bad", "great", "boring", ",", "."]
TEXTS = ["the film was good", "bad", 'a film that nobody wanted, "good" or not', "sky\nand sea", "caf\u00e9 \u4e2d"]


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("text model"))


@pytest.fixture(scope="module")
def service(text_model: Path) -> Iterator[Running]:
    running = start(text_model, max_request_mb=8)
    yield running
    status, log = stop(running)
    assert status == 0 and "Traceback" not in log


@pytest.fixture(scope="module")
def many() -> list[str]:
    random = np.random.default_rng(2)
    return [" ".join(random.choice(WORDS, random.integers(1, 60))) for _ in range(200)]


def alone(folder: Path, texts: list[str]) -> np.ndarray:
    model = load_model(folder, "cpu")
    return np.concatenate([predict(model, [model.preprocess.example(text.encode())]) for text in texts])


def probabilities(found: list[dict[str, Any]]) -> np.ndarray:
    table = pd.DataFrame(found)
    assert list(table) == ["label", "p_bad", "p_good", "p_none"]
    values = table.iloc[:, 1:].to_numpy()
    assert table["label"].tolist() == [["bad", "good", "none"][n] for n in values.argmax(1)]
    return values


def test_every_form_is_answered(service: Running, text_model: Path) -> None:
    """A client written for MLflow's server would have to be rewritten, or be told other probabilities."""
    wanted = alone(text_model, TEXTS)
    for body in (
        {"dataframe_split": {"columns": ["text"], "data": [[t] for t in TEXTS]}},
        {"dataframe_split": {"columns": ["id", "text"], "data": [["x", t] for t in TEXTS]}},
        {"dataframe_records": [{"id": "x", "text": t} for t in TEXTS]},
        {"dataframe_records": [{"review": t} for t in TEXTS]},
        {"instances": TEXTS},
        {"instances": [{"text": t} for t in TEXTS]},
        {"inputs": TEXTS},
        {"inputs": [[t] for t in TEXTS]},
        {"inputs": {"text": TEXTS}},
    ):
        np.testing.assert_allclose(probabilities(service.predict(body)), wanted, atol=1e-4)
    table = pd.DataFrame({"id": "x", "text": TEXTS})
    np.testing.assert_allclose(probabilities(service.predict(table.to_csv(), "text/csv")), wanted, atol=1e-4)
    for text, row in zip(TEXTS, wanted, strict=True):
        found = service.predict(f"\ufeff{text}\n".encode(), "text/plain")
        np.testing.assert_allclose(probabilities(found), row[None], atol=1e-4)
    found = service.predict(TEXTS[4].encode("utf-16"), "text/plain; charset=UTF-16")
    np.testing.assert_allclose(probabilities(found), wanted[4:], atol=1e-4)
    assert service.predict({"inputs": []}) == []


def test_texts_of_all_lengths_share_a_batch(service: Running, text_model: Path, many: list[str]) -> None:
    """A text's label must not depend on which others came at the same time, nor be another's."""
    wanted = alone(text_model, many)
    assert wanted.std(0).min() > 0.01, "all texts look alike to this network: the test shows nothing"
    np.testing.assert_allclose(probabilities(service.predict({"instances": many})), wanted, atol=1e-4)

    def client(number: int) -> None:
        connection = service.connect()
        for n in range(number, 200, 16):
            connection.request("POST", "/invocations", many[n].encode(), {"Content-Type": "text/plain"})
            found = json.loads(connection.getresponse().read())["predictions"]
            np.testing.assert_allclose(probabilities(found), wanted[n : n + 1], atol=1e-4)
        connection.close()

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(client, range(16)))


def test_mlflows_own_server_answers_the_same(service: Running, text_model: Path) -> None:
    """The field names are MLflow's to choose: what it gives for our pyfunc is what clients read."""
    from mlflow.pyfunc.scoring_server import invocations

    from graftwork.predictor import Predictor

    class Loaded(Predictor):
        metadata = None

        def predict(self, data, params=None):  # type: ignore[no-untyped-def]
            return super().predict(None, data, params)

    model = Loaded()
    model.model = load_model(text_model)
    for body in (
        {"dataframe_split": {"columns": ["id", "text"], "data": [["x", t] for t in TEXTS]}},
        {"dataframe_records": [{"text": t} for t in TEXTS]},
        {"instances": TEXTS},
        {"inputs": TEXTS},
    ):
        theirs = json.loads(invocations(json.dumps(body), "application/json", model, None).response)["predictions"]
        np.testing.assert_allclose(probabilities(service.predict(body)), probabilities(theirs), atol=1e-4)


def test_what_is_no_text_is_one_line(service: Running) -> None:
    """A developer would get a trace, or an answer to something that was not asked."""
    for status, body, kind, words in (
        (400, {"instances": ["good", ""]}, "application/json", "input 1: empty text"),
        (400, {"instances": ["good", " \n"]}, "application/json", "input 1: empty text"),
        (400, {"instances": ["good", None]}, "application/json", "input 1: is null; send text"),
        (400, {"instances": ["good", 3]}, "application/json", "input 1: is a int; send text"),
        (400, {"instances": [[[1, 2, 3]]]}, "application/json", "input 0: is a list; send text"),
        (400, '{"instances": ["\\ud800"]}', "application/json", "input 0: holds half a surrogate pair"),
        (400, {"instances": ["x" * 1_000_001]}, "application/json", "1,000,001 characters, more than 1,000,000"),
        (413, {"instances": ["x"] * 257}, "application/json", "257 texts in a request, 256 are allowed"),
        (413, b"x" * 9_000_000, "text/plain", "larger than 8,388,608 bytes"),
        (400, {"dataframe_records": [{"id": "1", "review": "x"}]}, "application/json", "no column is called 'text'"),
        (400, {"dataframe_records": [{"text": "x"}, {"id": "1"}]}, "application/json", "input 1: has no text"),
        (400, "a text\nanother", "text/csv", "the first line must name the columns: text"),
        (400, "", "text/plain", "the body is empty; send texts"),
        (400, " \n", "text/plain", "input 0: empty text"),
        (400, b"good \xff", "text/plain", "input 0: is not UTF-8 (byte 5)"),
        (400, b"good\x81", "text/plain; charset=cp1252", "input 0: is not CP1252 (byte 4)"),
        (415, "good", "text/plain; charset=base64", "charset base64"),
        (415, "good", "text/plain; charset=none-such", "charset none-such"),
        (415, "good", "image/png", "or a text as text/plain"),
        (415, "good", None, "or a text as text/plain"),
    ):
        found = service.post(body, kind)
        assert found[0] == status and words in found[1]["message"], (str(body)[:100], kind, found)
    assert len(service.predict({"instances": ["good"]})) == 1


def test_a_text_is_served_without_the_code_for_images(text_model: Path) -> None:
    """What breaks in one modality would break the other, and each start would take longer."""
    code = (
        "import sys, graftwork.serving as s; from graftwork.model import load_model\n"
        "w = s.Worker(load_model(sys.argv[1])); w.close()\n"
        "print(*[m for m in ('graftwork.images', 'graftwork.image_inputs', 'graftwork.backbones', 'mlflow', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(text_model)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_an_image_is_served_without_the_libraries_for_text(tuned: Path) -> None:
    """They are an extra, which a user of images has not installed."""
    code = (
        "import sys, graftwork.serving as s; from graftwork.model import load_model\n"
        "w = s.Worker(load_model(sys.argv[1])); w.close()\n"
        "print(*[m for m in ('transformers', 'tokenizers', 'graftwork.texts') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tuned)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_predict_labels_sentences_and_tables(text_model: Path, tmp_path: Path) -> None:
    """The command that the documentation shows."""
    (tmp_path / "t.csv").write_text('text,id\n"good, great",1\n,2\n')

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from graftwork.pipelines.cli import main; main()", "predict", text_model]
        return subprocess.run([str(c) for c in (*command, *arguments)], capture_output=True, text=True, cwd=tmp_path)

    done = run("the film was good", "bad")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["text", "label", "probability"] and lines[1].startswith("the film was good ")
    done = run("t.csv", "--table", "labels.csv")
    assert done.returncode == 1 and "t.csv row 2: empty text; left out" in done.stderr.replace("\n", " ")
    read = pd.read_csv(tmp_path / "labels.csv")
    assert list(read)[:3] == ["input", "text", "label"] and read["text"].tolist() == ["good, great"]
    done = run("gone.txt")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and "no such file" in done.stderr
