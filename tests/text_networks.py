"""Small networks of BERT's family, as transformers writes them into a folder: random, but the same every time."""

from pathlib import Path
from typing import Any

FAMILIES = ("bert", "distilbert", "roberta", "electra", "deberta-v2")
WORDS = """
the a film was is good bad and nobody wanted saw as it that never saw boring great plot actor music , . ! ?
cat dog bird fish red blue green sky sea sun moon bread cheese apple water one two three four five
""".split()  # noqa: SIM905
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def vocabulary() -> dict[str, int]:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(WORDS)]
    words += [letter for letter in LETTERS if letter not in words] + [f"##{letter}" for letter in LETTERS]
    return {word: n for n, word in enumerate(words)}


def make_tokenizer(pad_first: bool = True) -> Any:
    """Return a WordPiece tokenizer of a few words and all letters; without ``pad_first``, ids are RoBERTa's, whose padding is 1."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = vocabulary()
    if not pad_first:
        words |= {"[UNK]": 0, "[PAD]": 1}
    tokenizer = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = [("[CLS]", words["[CLS]"]), ("[SEP]", words["[SEP]"])]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=special
    )
    return tokenizer


def make_folder(path: Path, family: str = "bert", seed: int = 0) -> Path:
    """Write a small random network of ``family`` (``FAMILIES``) with its tokenizer into ``path``; return it."""
    import torch
    import transformers
    from transformers import PreTrainedTokenizerFast

    tokenizer = make_tokenizer(pad_first=family != "roberta")
    size = {"vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": 66}
    pad_id = tokenizer.token_to_id("[PAD]")
    configs: dict[str, Any] = {
        "bert": lambda: transformers.BertConfig(**SMALL, **size, pad_token_id=pad_id),
        "distilbert": lambda: transformers.DistilBertConfig(
            dim=32, n_layers=2, n_heads=4, hidden_dim=64, **size, pad_token_id=pad_id
        ),
        "roberta": lambda: transformers.RobertaConfig(**SMALL, **size, pad_token_id=pad_id),
        "electra": lambda: transformers.ElectraConfig(**SMALL, embedding_size=16, **size, pad_token_id=pad_id),
        "deberta-v2": lambda: transformers.DebertaV2Config(
            **SMALL,
            **size,
            pad_token_id=pad_id,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_biased_input=False,
        ),
    }
    random = torch.random.get_rng_state()
    torch.manual_seed(seed)
    network = transformers.AutoModel.from_config(configs[family]())
    torch.random.set_rng_state(random)
    path.mkdir(parents=True, exist_ok=True)
    network.save_pretrained(path, safe_serialization=True)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
    ).save_pretrained(path)
    return path


def make_table(path: Path, per_class: int = 40, seed: int = 0) -> Path:
    """Write a CSV file of sentences of random words, in which one word decides the label; return its path."""
    import csv
    import random

    draw = random.Random(seed)
    deciding = {"praise": ("good", "great"), "blame": ("bad", "boring"), "animals": ("cat", "dog")}
    others = [word for word in WORDS if word.isalpha() and all(word not in words for words in deciding.values())]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for _ in range(per_class):
            for label, words in deciding.items():
                sentence = draw.choices(others, k=draw.randint(3, 30))
                sentence.insert(draw.randint(0, len(sentence)), draw.choice(words))
                writer.writerow([" ".join(sentence), label])
    return path


def make_model(folder: Path, family: str = "bert", seed: int = 0) -> Path:
    """Write a Model artifact of a small network whose head is random, so that every text has probabilities of its own; return its folder."""
    import numpy as np

    from graftwork.model import save_model
    from graftwork.settings import FeatureSettings
    from graftwork.text_backbones import load_backbone

    backbone = load_backbone(FeatureSettings(backbone=str(make_folder(folder / family, family, seed))), 3)
    tensors = {name: value.numpy() for name, value in backbone.network.state_dict().items()}
    head = f"{backbone.head}.weight"
    tensors[head] = np.random.default_rng(seed).normal(0, 0.4, tensors[head].shape).astype(np.float32)
    info = {
        "modality": "text",
        "backbone": family,
        "backbone_args": backbone.args,
        "head": backbone.head,
        "classes": ["bad", "good", "none"],
        "preprocess": backbone.preprocess.model_dump(),
        "weights": backbone.weights,
        "candidate": "baseline",
        "dataset_digest": "0" * 16,
        "seconds": 0.0,
        "selection": {},
        "temperature": 1.5,
    }
    save_model(folder / "model", tensors, info, files=backbone.preprocess.files())
    return folder / "model"
