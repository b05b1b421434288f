"""The mistakes of a text model in the report: the texts as they are, and the words that spoke for the label."""

import csv
import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="pip install 'graftwork[text]'")

from text_networks import make_folder, make_table

from graftwork.dataset import Dataset, open_dataset
from graftwork.errors import UserError
from graftwork.evaluate import evaluate
from graftwork.ingest import ingest
from graftwork.model import load_model, read_info, save_model
from graftwork.report import pieces, render_evaluation
from graftwork.settings import EvaluateSettings, FeatureSettings, IngestSettings
from graftwork.text_backbones import load_backbone
from graftwork.text_showing import SHOWN, attributed, cut, weights, words_of

CLASSES = ["animals", "blame", "praise"]
DECIDING = {"good", "great", "bad", "boring", "cat", "dog"}
SCRIPT = "<script>alert('the film')</script> & a good \"plot\""
ARABIC = "هذا فيلم good عن القمر"
LONG = "the sea , the sky and a good moon ." * 40  # 1,400 characters, 400 tokens
SETTINGS = EvaluateSettings(resamples=100, attributions=True, slices=[])


def sentences(path: Path, per_class: int, seed: int) -> list[list[str]]:
    with make_table(path, per_class, seed).open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))[1:]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT, trained for a few seconds on sentences in which one word decides."""
    place = tmp_path_factory.mktemp("texts")
    backbone = load_backbone(FeatureSettings(backbone=str(make_folder(place / "bert"))), 3)
    network, preprocess = backbone.network, backbone.preprocess
    rows = sentences(place / "train.csv", 300, 1)
    ids = [preprocess.example(text.encode()) for text, _ in rows]
    targets = torch.tensor([CLASSES.index(label) for _, label in rows])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
        network.train()
        for _ in range(6):
            for some in torch.randperm(len(rows)).split(32):
                batch = preprocess.to_input(preprocess.stack([ids[n] for n in some.tolist()]), torch.device("cpu"))
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(network(batch), targets[some]).backward()
                optimizer.step()
    info = {
        "modality": "text",
        "backbone": "bert",
        "backbone_args": backbone.args,
        "head": backbone.head,
        "classes": CLASSES,
        "preprocess": preprocess.model_dump(),
        "weights": backbone.weights,
        "candidate": "baseline",
        "dataset_digest": "0" * 16,
        "seconds": 1.0,
        "selection": {"metric": "val_accuracy", "value": 1.0, "val": {"val_accuracy": 1.0, "val_loss": 0.1}},
        "temperature": 1.0,
    }
    tensors = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    save_model(place / "model", tensors, info, files=preprocess.files())
    return place / "model"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Texts that speak of praise and are labelled otherwise, among others, in the test split."""
    place = tmp_path_factory.mktemp("table")
    rows = [[*row, "train"] for row in sentences(place / "a.csv", 5, 2)]
    rows += [[*row, "val"] for row in sentences(place / "b.csv", 5, 3)]
    rows += [[*row, "test"] for row in sentences(place / "c.csv", 15, 4)]
    rows += [[text, "blame", "test"] for text in (SCRIPT, ARABIC, LONG)]
    with (place / "all.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["text", "label", "split"], *rows])
    ingest(IngestSettings(data=str(place / "all.csv")), place / "dataset")
    return open_dataset(place / "dataset")


@pytest.fixture(scope="module")
def result(dataset: Dataset, model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("evaluation") / "out"
    return evaluate(dataset, {"baseline": model}, SETTINGS, folder), folder


def test_the_word_that_decides_has_the_largest_weight(model: Path, tmp_path: Path) -> None:
    """Colours on the wrong words would send a person after what is no reason at all."""
    loaded = load_model(model, "cpu")
    rows = sentences(tmp_path / "new.csv", 8, 5)
    state = torch.random.get_rng_state()
    for text, label in rows:
        words = weights(loaded, text, CLASSES.index(label), len(text))
        assert " ".join(word for word, _ in words) == text
        assert max(words, key=lambda one: one[1])[0] in DECIDING
        assert max(abs(weight) for _, weight in words) == 1
    assert torch.equal(state, torch.random.get_rng_state()), "training after it would draw other numbers"
    assert all(p.grad is None for p in loaded.network.parameters())


def test_words_for_and_against_have_their_signs(model: Path) -> None:
    """Blue for what spoke against the label would turn every explanation round."""
    loaded = load_model(model, "cpu")
    for good, bad in (("good", "bad"), ("great", "boring"), ("great", "bad")):
        for target, sign in ((CLASSES.index("praise"), 1), (CLASSES.index("blame"), -1)):
            found = dict(map(tuple, weights(loaded, f"{good} film {bad} plot", target, 99)))
            assert sign * found[good] > 0 > sign * found[bad]


def test_weights_add_up_to_what_the_text_changes(model: Path) -> None:
    """With too few steps, or another beginning than padding, the weights are of something else than this prediction."""
    loaded = load_model(model, "cpu")
    for text in ("the film was good", "nobody saw a dog , nobody wanted it as it was boring"):
        ids = torch.from_numpy(loaded.preprocess.example(text.encode()))[None].long()
        nothing = ids.clone()
        nothing[:, 1:-1] = loaded.network.pad_id
        with torch.no_grad():
            mask = torch.ones_like(ids, dtype=torch.bool)
            full, empty = (loaded.network(inputs_embeds=loaded.network.embed(x), mask=mask)[0] for x in (ids, nothing))
        for target in range(3):  # with many steps: the network is a small one, of random embeddings
            change = (full[target] - full.mean()) - (empty[target] - empty.mean())
            assert attributed(loaded, text, target, 256).sum() == pytest.approx(
                float(change), abs=0.02 * float(full.std())
            )


def test_the_report_shows_the_texts(result: tuple[dict[str, Any], Path], dataset: Dataset) -> None:
    """A text that is markup, runs from right to left or is long must be shown as what it is, and break nothing of the page."""
    found, folder = result
    mistakes = {one["text"]: one for one in found["mistakes"]}
    assert {SCRIPT, ARABIC} < mistakes.keys()
    assert all(one["label"] == "blame" and one["predicted"] == "praise" for one in (mistakes[SCRIPT], mistakes[ARABIC]))
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "http" not in page
    quotes = re.findall(r'<blockquote dir="auto">(.*?)</blockquote>', page, re.DOTALL)
    assert len(quotes) == len(found["mistakes"])
    shown = [html.unescape(re.sub("<[^>]+>", "", quote)) for quote in quotes]
    assert SCRIPT in shown and ARABIC in shown, "character for character"
    tinted = quotes[shown.index(ARABIC)]
    assert re.search(r'<span class="w" style="background:rgba\(36,99,235,0\.60\)" title="\+1\.00">good</span>', tinted)
    assert "against" in page and "data:image/png" in page  # the legend, and the other pictures
    assert json.loads((folder / "evaluation.json").read_text())["mistakes"] == found["mistakes"]
    assert not (folder / "mistakes").exists()
    assert "of up to 64 tokens" in page and "transformers" in page and "test examples" in page


def test_a_long_text_is_cut_and_says_so(result: tuple[dict[str, Any], Path]) -> None:
    """Twelve novels would make a page that no browser opens; a text cut without a mark would be taken for the whole."""
    found, folder = result
    (one,) = [one for one in found["mistakes"] if one["left_out"]]
    assert LONG.startswith(one["text"]) and SHOWN - 30 < len(one["text"]) <= SHOWN
    assert len(one["text"]) + one["left_out"] == len(LONG)
    assert one["read"] < len(one["text"]), "the network read 64 tokens"
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert f"… and {one['left_out']:,} more characters" in page
    parts = pieces(one)
    assert "".join(part["text"] for part in parts) == one["text"]
    assert parts[-1]["unread"] and len(parts[-1]["text"]) == len(one["text"]) - one["read"]
    assert page.count("the model did not read it") == 1
    assert "What is grey was cut off" in page


def test_attributions_are_on_request(dataset: Dataset, model: Path, tmp_path: Path) -> None:
    """They take a gradient through every mistake: who does not ask should not wait."""
    settings = SETTINGS.model_copy(update={"attributions": False})
    found = evaluate(dataset, {"baseline": model}, settings, tmp_path / "out")
    assert found["mistakes"] and all(one["words"] == [] for one in found["mistakes"])
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "background:rgba" not in page and "gradients" not in page and html.escape(ARABIC) in page


def test_distortions_are_for_images(dataset: Dataset, model: Path, tmp_path: Path) -> None:
    """A setting without effect would be taken for a test that was passed."""
    settings = EvaluateSettings(corruptions=["noise", "jpeg"])
    with pytest.raises(
        UserError, match=r"^setting corruptions = noise, jpeg: distortions are for images; leave it out"
    ):
        evaluate(dataset, {"baseline": model}, settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_several_seeds_show_their_spread(dataset: Dataset, model: Path, tmp_path: Path) -> None:
    """The best of five seeds is shown beside what the others reached: alone, it is the luckiest."""
    info = read_info(model)
    assert "By seed" not in (page_of(dataset, {"baseline": model}, tmp_path / "one"))
    info["seeds"] = [
        {"seed": n, "epoch": 2, "seconds": 1.0, "val_accuracy": accuracy, "val_loss": loss}
        for n, (accuracy, loss) in enumerate([(0.8, 0.5), (0.9, 0.4), (0.7, 0.6), (0.9, 0.3)], start=7)
    ]
    several = tmp_path / "several"
    several.mkdir()
    for file in model.iterdir():
        (several / file.name).write_bytes(file.read_bytes())
    (several / "model.json").write_text(json.dumps(info))
    page = page_of(dataset, {"baseline": model, "fine_tuned": several}, tmp_path / "two")
    row = re.sub(r"<[^>]+>", " ", page[page.index("By seed") :].split("<tr>")[2].split("</table>")[0])
    assert row.split() == ["fine-tuned", "4", "accuracy", "0.8250", "0.0957", "0.7000", "0.9000", "seed", "10"]


def page_of(dataset: Dataset, models: dict[str, Path], folder: Path) -> str:
    found = evaluate(dataset, models, EvaluateSettings(resamples=100, slices=[]), folder)
    seeds = {name: one["seeds"] for name, one in found["candidates"].items()}
    assert seeds == {name: read_info(path).get("seeds", []) for name, path in models.items()}
    # As the register step makes it again, from the file.
    kept = json.loads((folder / "evaluation.json").read_text())
    return render_evaluation(kept, dataset.info, read_info(models[found["chosen"]]), folder)


@pytest.mark.parametrize(
    ("text", "offsets", "words"),
    [
        ("unaffable film", [(0, 0), (0, 2), (2, 5), (5, 9), (10, 14), (0, 0)], ["unaffable", "film"]),
        ("good, bad", [(0, 4), (4, 5), (6, 9)], ["good", ",", "bad"]),
        ("don't l’eau", [(0, 3), (3, 4), (4, 5), (6, 7), (7, 8), (8, 11)], ["don't", "l’eau"]),
        ("a film", [(0, 1), (1, 6)], ["a", "film"]),  # byte-level: the blank before a word is part of its token
        ("電影很好", [(0, 1), (1, 2), (2, 3), (3, 4)], ["電", "影", "很", "好"]),
        ("ok👍🏽!", [(0, 2), (2, 3), (2, 3), (2, 3), (3, 4), (4, 5)], ["ok", "👍🏽"[0], "👍🏽"[1], "!"]),
        ("नमस्ते", [(0, 1), (1, 2), (2, 4), (4, 6)], ["नमस्ते"]),  # vowel signs are no letters to Python
        ("   ", [(0, 3)], []),
    ],
)  # fmt: skip
def test_pieces_become_words(text: str, offsets: list[tuple[int, int]], words: list[str]) -> None:
    """A weight for "##able" tells a person nothing; one for a whole line of Chinese no more."""
    found = words_of(text, offsets)
    assert [text[word.start : word.end] for word in found] == words
    counted = [n for word in found for n in word.tokens]
    assert counted == sorted(set(counted)), "no token counts twice"


def test_pieces_of_the_real_tokenizer_become_words(model: Path) -> None:
    """The offsets of a tokenizer are its own: letters, here, of every word that it does not know."""
    loaded = load_model(model, "cpu")
    words = weights(loaded, "Nobody  understood the\nplot, it's awful!", 0, 99)
    assert [word for word, _ in words] == ["Nobody", "understood", "the", "plot", ",", "it's", "awful", "!"]
    assert all(-1 <= weight <= 1 for _, weight in words)


def test_no_character_is_cut_in_two() -> None:
    """Half of an emoji, or a letter without its accent, is another text."""
    assert cut("a" * SHOWN) == SHOWN and cut("a" * (SHOWN + 1)) == SHOWN
    assert cut("a" * (SHOWN - 9) + " " + "b" * 50) == SHOWN - 9
    assert cut("a" * (SHOWN - 1) + "e\N{COMBINING ACUTE ACCENT}" + "b" * 9) == SHOWN - 1
    family = "👩\N{ZERO WIDTH JOINER}👧"
    assert cut("a" * (SHOWN - 1) + family + "b" * 9) == SHOWN - 1
    assert cut("a" * (SHOWN - 2) + family + "b" * 9) == SHOWN - 2
