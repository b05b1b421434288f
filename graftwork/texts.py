"""One text: from bytes to the ids of its tokens. Training, evaluation and service all call ``Preprocess.example``.

The tokenizer is Hugging Face's ``tokenizers``, from the network's own ``tokenizer.json``, which travels in the Model artifact; transformers is not
needed for it.
"""

import hashlib
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, PrivateAttr

from graftwork.errors import UserError, one_line
from graftwork.modality import BrokenExampleError
from graftwork.text_names import INSTALL

if TYPE_CHECKING:
    import torch

LIBRARIES = ("transformers", "tokenizers")  # on whose versions a text model depends
TOKENIZER = "tokenizer.json"  # in a Model artifact
TOKENS_AT_ONCE = {"cpu": 16 * 64, "cuda": 256 * 128, "mps": 64 * 128}
Array = npt.NDArray[np.int32]


class Token(NamedTuple):
    """A token and the characters of the text that it stands for; special tokens stand for none (``start == end``)."""

    token: str
    start: int
    end: int


class Preprocess(BaseModel):
    """How a text becomes a network's input: at most ``max_length`` tokens, special ones included; ``tokenizer`` is its SHA-256."""

    model_config = ConfigDict(frozen=True)

    max_length: int
    pad_id: int
    tokenizer: str

    _json: bytes = PrivateAttr(b"")

    @classmethod
    def of(cls, tokenizer_json: bytes, max_length: int, pad_id: int) -> "Preprocess":
        """Return the Preprocess with this tokenizer.

        Raises:
            UserError: it is none that can be read, or the extra is not installed.
        """
        made = cls(max_length=max_length, pad_id=pad_id, tokenizer=hashlib.sha256(tokenizer_json).hexdigest())
        made._json = tokenizer_json
        made.cutting  # noqa: B018  read now, so that what is damaged is refused where it is found
        return made

    @cached_property
    def cutting(self) -> Any:
        """The tokenizer that cuts off what is over ``max_length``. Safe to be used by several threads."""
        tokenizer = read_tokenizer(self._json)
        tokenizer.enable_truncation(self.max_length)
        return tokenizer

    @cached_property
    def whole(self) -> Any:
        """The tokenizer that cuts nothing off."""
        return read_tokenizer(self._json)

    # As graftwork.modality.Preprocess says.

    def example(self, data: bytes, limit: int = 0) -> Array:
        return np.array(self.cutting.encode(text_of(data)).ids, np.int32)

    def stack(self, examples: Sequence[Array]) -> "torch.Tensor":
        """Return int32 of shape (N, tokens of the longest), filled up with ``pad_id``."""
        import torch

        batch = np.full((len(examples), max(map(len, examples), default=0)), self.pad_id, np.int32)
        for row, example in zip(batch, examples, strict=True):
            row[: len(example)] = example
        return torch.from_numpy(batch)

    def to_input(self, batch: "torch.Tensor", device: "torch.device") -> "torch.Tensor":
        """Return the ids, int64, without the columns in which no text of the batch has a token left."""
        longest = int(self.lengths(batch).max()) if batch.numel() else 0
        return batch[:, :longest].to(device, non_blocking=True).long()

    def lengths(self, batch: "torch.Tensor") -> "torch.Tensor":
        import torch

        # Up to the last token: a text may spell out the token that fills up.
        return ((batch != self.pad_id) * torch.arange(1, batch.shape[1] + 1, device=batch.device)).amax(1)

    @property
    def example_bytes(self) -> int:
        return 4 * self.max_length + 112  # an array's own bytes, too

    @property
    def at_once(self) -> dict[str, int]:
        # Texts are seldom of the full length, and those of like length pass together.
        return {device: max(8, tokens // min(self.max_length, 64)) for device, tokens in TOKENS_AT_ONCE.items()}

    def options(self, device: str) -> dict[str, tuple[str, ...]]:
        # A traced or compiled network is made for one shape; batches of texts have many.
        return {"engine": ("eager",), "memory_format": ("contiguous",)}

    @property
    def shape_key(self) -> str:
        return f"tokens {self.max_length}"

    def files(self) -> dict[str, bytes]:
        return {TOKENIZER: self._json}

    # For text alone.

    def tokens(self, text: str) -> list[Token]:
        """Return the tokens that ``example`` keeps of ``text``, with the characters they stand for."""
        found = self.cutting.encode(text)
        return [Token(token, *place) for token, place in zip(found.tokens, found.offsets, strict=True)]

    def is_cut(self, text: str) -> bool:
        return len(self.whole.encode(text).ids) > self.max_length


def text_of(data: bytes) -> str:
    """Return a packed text.

    Raises:
        BrokenExampleError: it is no UTF-8, or there is nothing in it.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BrokenExampleError(f"not UTF-8 (byte {error.start})") from None
    text = (
        text.strip()
    )  # blanks at the ends are no part of it, in a file as in a table or a request: some tokenizers would count them
    if not text:
        raise BrokenExampleError("empty text")
    return text


def read_tokenizer(data: bytes) -> Any:
    """Return a ``tokenizers.Tokenizer`` that neither cuts off nor fills up.

    Raises:
        UserError: ``data`` is none, or the extra is not installed.
    """
    # Its own threads fight with torch's; the texts of a batch are spread over threads already.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise UserError(f"text: needs packages that are not installed; {INSTALL}") from None
    try:
        tokenizer = Tokenizer.from_str(data.decode("utf-8"))
    except Exception as error:  # the library raises plain Exception
        raise UserError(
            f"{TOKENIZER}: is no tokenizer ({one_line(error, 120)}); give the network's own folder"
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read_preprocess(values: dict[str, Any], folder: Path) -> Preprocess:
    """Return the Preprocess that a ``model.json`` describes, with the tokenizer in its ``folder``.

    Raises:
        UserError: the tokenizer is missing, or another one.
    """
    path = Path(folder) / TOKENIZER
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"model {folder}: has no {TOKENIZER} ({error.strerror}); train or fetch it again") from None
    if hashlib.sha256(data).hexdigest() != values["tokenizer"]:
        raise UserError(
            f"model {folder}: {TOKENIZER} is not the file that model.json describes (damaged or replaced); train or fetch it again"
        )
    return Preprocess.of(data, int(values["max_length"]), int(values["pad_id"]))
