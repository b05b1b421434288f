"""The seam: what differs between images and text, by the names of the modules that know it.

Reading an example, transforming it, loading a backbone, describing and showing an example differ; a module of each modality does each, with the
functions that the protocols below ask for. No other code asks which modality it has: it asks ``part`` for the module. Adding a modality is a line in
``MODALITIES`` and these modules; ``CONTRIBUTING.md`` walks through it.
"""

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import numpy as np
import numpy.typing as npt

from graftwork.errors import UserError, one_line

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    import torch

    from graftwork.batches import Examples
    from graftwork.dataset import Dataset
    from graftwork.execution import Execution
    from graftwork.model import Model
    from graftwork.settings import FeatureSettings, IngestSettings, ValidateSettings
    from graftwork.strategies import Recipe

# Imported when they are first asked for: packing needs no torch, an image run no transformers.
MODALITIES = {
    "image": {
        "names": "graftwork.image_names",
        "transforms": "graftwork.images",
        "backbones": "graftwork.backbones",
        "looks": "graftwork.image_looks",
        "showing": "graftwork.image_showing",
        "inputs": "graftwork.image_inputs",
    },
    "text": {
        "names": "graftwork.text_names",
        "transforms": "graftwork.texts",
        "backbones": "graftwork.text_backbones",
        "looks": "graftwork.text_looks",
        "showing": "graftwork.text_showing",
        "inputs": "graftwork.text_inputs",
    },
}
# What else is slow to import where networks are made: a run imports it while its first step is at work.
SLOW = {"image": ("timm",), "text": ("transformers.modeling_utils", "transformers.models.auto.modeling_auto")}
DEFAULT = "image"  # of artifacts that are older than the second modality
Array = npt.NDArray[Any]
Index = npt.NDArray[np.int64]


class BrokenExampleError(Exception):
    """The bytes are no example that can be used; the text is the reason, in a few words."""


class Preprocess(Protocol):
    """How an encoded example becomes a network's input. A frozen pydantic model: equal ones give equal inputs."""

    def example(self, data: bytes, limit: int = 0) -> Array:
        """Return one example's array, from its encoded bytes: uint8 (size, size, 3), or int32 (tokens,). ``limit``: 0, or ``max_pixels``.

        Raises:
            BrokenExampleError: the bytes are no such example.
        """

    def stack(self, examples: Sequence[Array]) -> "torch.Tensor":
        """Return a batch of examples on the CPU: (N, size, size, 3), or (N, tokens of the longest), filled up."""

    def to_input(self, batch: "torch.Tensor", device: "torch.device") -> "torch.Tensor":
        """Return what the network takes, on ``device``."""

    def lengths(self, batch: "torch.Tensor") -> "torch.Tensor | None":
        """Return what each example of a batch costs, (N,), in any unit; None where all cost the same."""

    @property
    def example_bytes(self) -> int:
        """Bytes of one example's array, at most: by it, a split is held in memory or not."""

    @property
    def at_once(self) -> dict[str, int]:
        """Examples that pass through a network at once where nothing was timed, by device type."""

    def options(self, device: str) -> dict[str, tuple[str, ...]]:
        """Return the engines and memory formats that are worth a trial on a device, the usual one first."""

    @property
    def shape_key(self) -> str:
        """Tells one shape of input from another: execution plans are kept by it."""

    def model_dump(self) -> dict[str, Any]: ...

    def files(self) -> dict[str, bytes]:
        """Return the files that belong to it, as a tokenizer, by name: they travel in the Model artifact."""


class Names(Protocol):
    """Module: what backbones are called. Imports neither torch nor what networks are made by."""

    DEFAULT: str  # the backbone of a run that names none

    def check_backbone(self, parameters: dict[str, Any], cache: Path) -> None:
        """Refuse a backbone that cannot be, before anything runs; "backbone" and "weights" may be set. What is slow to find out is kept in ``cache``.

        Raises:
            UserError: there is no such network.
        """


class Transforms(Protocol):
    """Module: from bytes to arrays. Imports no torch."""

    LIBRARIES: tuple[str, ...]  # on whose versions a model depends, beside torch and NumPy

    def read_preprocess(self, values: dict[str, Any], folder: Path) -> Preprocess:
        """Return the Preprocess that ``model.json`` of the Model artifact ``folder`` describes."""


class Backbone(NamedTuple):
    """A pretrained network whose head has one zero row a class, and what is needed to build and feed it again.

    The network has timm's methods: forward_features, forward_head(x, pre_logits), get_classifier, reset_classifier, group_matcher.
    """

    network: Any  # an nn.Module
    args: dict[str, Any]  # to ``build``; JSON-ready
    preprocess: Any  # a Preprocess
    head: str  # the head's name in the state dict, without ".weight"
    weights: dict[str, str]  # where they came from: {"source", "sha256"}
    fixed_size: bool  # built for one input size, as networks with position embeddings are


class Backbones(Protocol):
    """Module: networks."""

    RECIPE: "Recipe"  # how they are trained, where the user says nothing

    def load_backbone(self, settings: "FeatureSettings", classes: int) -> Backbone: ...

    def build(self, name: str, args: dict[str, Any], classes: int) -> Any:
        """Build the network, an nn.Module, with random weights and a head of ``classes`` outputs; nothing is fetched."""

    def check_name(self, name: str) -> None: ...

    def choose_preprocess(
        self, dataset: "Dataset", settings: "FeatureSettings", backbone: Backbone, note: Callable[[str], None]
    ) -> tuple[Any, list[dict[str, Any]]]:
        """Return the Preprocess for ``--preprocess auto``, and what was tried."""

    def remarks(self, dataset: "Dataset", preprocess: Any, note: Callable[[str], None]) -> dict[str, float]:
        """Note how the examples fit the network, as how many are cut off, where that is worth a word; return it as metrics."""

    def augment(
        self, batch: "torch.Tensor", augmentation: dict[str, Any], generator: "torch.Generator"
    ) -> "torch.Tensor":
        """Return ``batch`` changed at random in ways that keep the labels."""

    def choose_augmentation(
        self,
        settings: "FeatureSettings",
        examples: Any,
        features: Callable[[Index], npt.NDArray[np.float32]],
        run: Callable[["torch.Tensor"], "torch.Tensor"],
        note: Callable[[str], None],
    ) -> dict[str, Any]:
        """Return the augmentation, {} for none. ``features`` gives the rows of the training examples at positions."""

    def training_augmentation(self, flip: str, shift: float, baselines: dict[str, Any]) -> dict[str, Any]:
        """Return the augmentation of fine-tuning: what its settings say, and where they say nothing, as the baseline had it."""

    def reset_top(self, network: Any, count: int) -> None:
        """Give the highest ``count`` layers below the head new random weights. UserError: this network has no such layers."""


class Looked(NamedTuple):
    """What one look at an encoded example tells."""

    width: int  # of an image, pixels, upright; of a text, characters
    height: int  # of an image, pixels; of a text, lines
    mode: str  # of an image, Pillow's, as found; of a text, its encoding
    suffix: str  # of ``scaled``
    scaled: bytes | None  # encoded anew, where it is not packed as it was
    signature: Any  # a NamedTuple: a row of ``signatures.parquet``


class Looks(Protocol):
    """Module: what an example is like, for packing, validation, drift and slices. Imports no torch."""

    NOUN: str  # "image", as messages say it
    HINT: str  # what to give where none can be used
    SIGNATURE: "pa.Schema"  # of ``signatures.parquet``
    COLUMNS: tuple[str, ...]  # that ``columns`` gives
    SLICES: tuple[str, ...]  # those of them that every evaluation is sliced by
    SIZE: tuple[str, str]  # the one whose histogram the validation page shows, and its heading
    EDGES: dict[str, npt.NDArray[np.float64]]  # of the histograms of the drift profile, by measure
    MEASURES: dict[str, str]  # measure: what has shifted, in words, as "brightness of the images"
    NEAR: str  # what near duplicates do, as "look like one in another split"

    def recipe(self, settings: "IngestSettings") -> str:
        """Return what decides how an example is packed: another text packs everything again."""

    def lookers(self, settings: "IngestSettings", lock: Path) -> "AbstractContextManager[Looker]":
        """Return a context in which examples are looked at; ``lock`` is an empty file that all who pack share."""

    def measures(self, dataset: "Dataset") -> dict[str, npt.NDArray[Any]]:
        """Return the values of each measure of ``EDGES``, (N,), in the manifest's order."""

    def columns(self, dataset: "Dataset", rows: "pa.Table") -> "pd.DataFrame":
        """Return ``COLUMNS``, a row an example of ``rows``."""

    def near_duplicates(self, dataset: "Dataset", split: Index, content: Index) -> tuple[Index, Index]:
        """Return rows that are nearly those of another split, each once, and those, the surest first."""

    def rules(self, examples: "pd.DataFrame", settings: "ValidateSettings", rule: Any, rows: Any) -> list[Any]:
        """Return the rules of this modality alone. ``rule`` makes one; ``rows`` finds where a mask holds, as in ``graftwork.validate``."""

    def card(self, dataset: "Dataset", row: int) -> dict[str, str]:
        """Return what the validation page shows of a row of the manifest: {"picture": a data URI} or {"text": ...}."""


class Looker(Protocol):
    def look(self, examples: list[bytes]) -> "list[Looked | str]":
        """Look at encoded examples: what each tells, or why it cannot be used. Safe to be called from several threads."""


class Showing(Protocol):
    """Module: examples in the report of an evaluation, for a person to look at; and what the test is repeated with."""

    def mistakes(
        self,
        dataset: "Dataset",
        rows: "pa.Table",
        predicted: Index,
        model: "Model",
        folder: Path,
        attributions: bool = False,
    ) -> list[dict[str, Any]]:
        """Return for each of ``rows``, at least one of the test split, what the report shows of it, and what spoke for the class ``predicted`` (N,).

        {"picture", "saliency"}: PNG files, which go into ``folder``/mistakes; or {"text", "read", "left_out", "words"}, where "words" are
        [word, weight] in the order of the text, only with ``attributions``. A weight is from -1 to 1, the largest of each text.
        """

    def check_corruptions(self, kinds: list[str]) -> None:
        """Refuse distortions that cannot be had. UserError: a kind is unknown, or there are none for this modality."""

    def distorted(
        self,
        model: "Model",
        test: "Examples",
        targets: Index,
        kinds: list[str],
        execution: "Execution",
        note: Callable[[str], None],
    ) -> list[dict[str, Any]]:
        """Return a row for each of ``kinds`` and severity: corruption, severity, accuracy, interval and drop."""


class Inputs(Protocol):
    """Module: examples as people and programs hand them over, for labels: on the command line, over HTTP, to the pyfunc. Imports no torch."""

    COLUMN: str  # of a table that is sent, "image" or "text"
    COLUMN_TYPE: str  # of that column in the signature of a registered model, as MLflow's DataType calls it
    HEADINGS: tuple[
        str, ...
    ]  # of the columns in a table of labels that say which example it is: its name, and its text
    TABLE_COLUMN: tuple[
        str, tuple[str, ...]
    ]  # of a table that is read from a file: "path" or "text", and the names that it may have
    TOGETHER: int  # micro-batches that are put in order together: more than one where examples are of many lengths
    BODY: str  # what a request may be instead of JSON or CSV, in words
    SEND: str  # in words, what a value in a request must be
    SAMPLE: str  # stands for such a value
    USE: str  # Python that makes a column for the registered model
    ONNX: bool  # whether a model can be exported

    def rest(self, given: str) -> Any:
        """Return the ``Item`` or ``Part`` that is meant by an input that is neither a path nor a URI. UserError: it is nothing."""

    def read(self, item: Any, preprocess: Preprocess) -> tuple[Array, str]:
        """Return an item's example, and its text for the table of labels. BrokenExampleError, OSError: it cannot be used."""

    def is_body(self, kind: str) -> bool:
        """Tell whether a request of this content type has one example as its body."""

    def from_body(self, body: bytes, charset: str) -> Any:
        """Return what is sent as a body. BrokenExampleError: it cannot be used."""

    def check(self, value: Any) -> Any:
        """Return a value of a request's JSON or CSV as ``example`` takes it, None where it is of no such kind. ValueError, BrokenExampleError: it is bad."""

    def example(self, item: Any, preprocess: Preprocess) -> Array:
        """Return the example of what ``from_body`` or ``check`` gave. BrokenExampleError: it cannot be used."""

    def column(self, names: list[Any]) -> Any:
        """Return which of a sent table's columns holds the examples. ValueError: that is not clear."""

    def is_header(self, names: list[str], followed: bool) -> bool:
        """Tell whether the first row of a CSV that is sent names the columns; ``followed``: there are others."""

    def samples(self, preprocess: Preprocess, count: int) -> list[Array]:
        """Return examples at random, always the same, for timing a network and comparing it."""

    def from_python(self, value: Any, preprocess: Preprocess) -> Array:
        """Return the example of a value that is given to the pyfunc. ValueError, OSError, BrokenExampleError: it cannot be used."""

    def from_table(self, table: "pd.DataFrame") -> list[Any]:
        """Return the values of a table that is given to the pyfunc. ValueError: it has no such column."""

    def example_table(self) -> "pd.DataFrame":
        """Return two examples as a client sends them."""

    def size_in_words(self, preprocess: dict[str, Any]) -> str:
        """Return what a model card says of the network's input, as "at 96 pixels"."""


def name_of(info: dict[str, Any]) -> str:
    """Return the modality that ``dataset.json``, ``embeddings.json`` or ``model.json`` names."""
    return str(info.get("modality", DEFAULT))


def part(info: "dict[str, Any] | str", name: str) -> Any:
    """Return the module ``name`` ("transforms", "backbones", "looks", "showing", "inputs") of the modality that ``info`` names.

    Raises:
        UserError: the modality is of a later version.
    """
    modality = info if isinstance(info, str) else name_of(info)
    if modality not in MODALITIES:
        raise UserError(
            f"modality {one_line(modality)!r}: this version knows {' and '.join(MODALITIES)}; upgrade graftwork"
        )
    return importlib.import_module(MODALITIES[modality][name])


def names(info: "dict[str, Any] | str") -> Names:
    return cast(Names, part(info, "names"))


def backbone_of(info: "dict[str, Any] | str", name: str) -> str:
    """Return the backbone that is meant by ``name``: where it is the default of all, this modality's own."""
    from graftwork.settings import DEFAULT_BACKBONE

    return names(info).DEFAULT if name == DEFAULT_BACKBONE else name


def check_some(parameters: dict[str, Any], cache: Path) -> None:
    """Refuse a backbone that no modality knows, where the data, which would tell the modality, cannot be looked at from here.

    Raises:
        UserError: the modality that the parameters name has no such network; where they name none, what the first has to say.
    """
    wanted = str(parameters["modality"])
    first: UserError | None = None
    for modality in MODALITIES if wanted not in MODALITIES else [wanted]:
        try:
            names(modality).check_backbone(parameters, cache)
            return
        except UserError as error:
            first = first or error
    if first:
        raise first


def imports(modality: str, *parts: str) -> list[str]:
    """Return the modules that steps of this modality import: of the given parts, or of all, in the order of their use."""
    known = MODALITIES.get(modality, {})
    names = [known[part] for part in known if not parts or part in parts]
    return [*names, *(SLOW.get(modality, ()) if not parts or "backbones" in parts else ())]


def transforms(info: "dict[str, Any] | str") -> Transforms:
    return cast(Transforms, part(info, "transforms"))


def backbones(info: "dict[str, Any] | str") -> Backbones:
    return cast(Backbones, part(info, "backbones"))


def looks(info: "dict[str, Any] | str") -> Looks:
    return cast(Looks, part(info, "looks"))


def showing(info: "dict[str, Any] | str") -> Showing:
    return cast(Showing, part(info, "showing"))


def inputs(info: "dict[str, Any] | str") -> Inputs:
    return cast(Inputs, part(info, "inputs"))
