"""Images as people and programs hand them over: paths and named datasets, base64 text, encoded bytes, arrays (H, W, 3) of uint8."""

import base64
import binascii
import contextlib
import io
import warnings
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from graftwork.errors import UserError, one_line
from graftwork.images import LARGE, LARGE_PIXELS, Array, BrokenImageError, Preprocess, decode, fit, guard, to_rgb
from graftwork.predicting import Item, Part
from graftwork.sources.manifest import COLUMNS

if TYPE_CHECKING:
    import pandas as pd

COLUMN = "image"  # of what is sent, where there are several columns; else the first one
COLUMN_TYPE = "binary"
HEADINGS = ("image",)
TABLE_COLUMN = ("path", COLUMNS["path"])
TOGETHER = 1
BODY = "an image as image/*"
SEND = "base64 text"
SAMPLE = "BASE64"
USE = '[open("photo.jpg", "rb").read()]'
ONNX = True
MAX_PIXELS = 100_000_000  # of an image, as when a dataset is packed
HEADER = 64  # characters of a column's name: what is longer is an image

# For good: Pillow warns of images half as large as those that are refused, and a filter set for one thread is set for all.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


# ---- on the command line -------------------------------------------------------------------------------------------------------


def rest(given: str) -> Part:
    from graftwork.sources.arrays import open_named
    from graftwork.sources.torchvision_sets import open_torchvision

    source = open_named(given) or open_torchvision(given)
    if source is None:
        raise UserError(f"input {one_line(given)}: no such file; check the path")
    return Part((Item(f"{given}/{r.key}", r.content) for r in source.records()), len(source), source.readers)


def read(item: Item, preprocess: Preprocess) -> tuple[Array, str]:
    return fit(decode(item.content.read()), preprocess), ""


# ---- over HTTP -----------------------------------------------------------------------------------------------------------------


def is_body(kind: str) -> bool:
    return kind.startswith("image/")


def from_body(body: bytes, charset: str) -> bytes:
    return body


def check(value: Any) -> str | Array | None:
    """Return base64 text, which is decoded later, in parallel, or nested lists as an array."""
    if isinstance(value, str) and value:
        return value
    return to_array(value) if isinstance(value, list) else None


def to_array(rows: list[Any]) -> Array:
    """Turn nested lists (H, W, 3) of whole numbers in 0..255 into an array.

    Raises:
        ValueError: it is something else.
    """
    # NumPy would turn a mixture of texts and numbers into an array of texts, each as long as the longest.
    wide = len(rows[0]) if rows and isinstance(rows[0], list) else 0
    even = all(isinstance(row, list) and len(row) == wide for row in rows)
    if not wide or not even or not all(isinstance(p, list) and len(p) == 3 for row in rows for p in row):
        raise ValueError("is no array of shape (height, width, 3); send that or base64 text")
    if len(rows) * wide > MAX_PIXELS:
        raise ValueError(f"{wide} x {len(rows)} pixels, more than {MAX_PIXELS:,}")
    flat = list(chain.from_iterable(chain.from_iterable(rows)))
    if set(map(type, flat)) != {int} or min(flat) < 0 or max(flat) > 255:
        raise ValueError("has values that are no whole numbers from 0 to 255")
    return np.frombuffer(bytes(flat), np.uint8).reshape(len(rows), wide, 3)


def example(item: str | bytes | Array, preprocess: Preprocess) -> Array:
    if isinstance(item, np.ndarray):
        return fit(to_rgb(Image.fromarray(item)), preprocess)
    if isinstance(item, str):
        try:
            item = base64.b64decode(item, validate=True)
        except (binascii.Error, ValueError):
            raise BrokenImageError("is no base64 text") from None
    guard(MAX_PIXELS)
    with LARGE if is_large(item) else contextlib.nullcontext():
        return fit(decode(item, MAX_PIXELS), preprocess)


def is_large(data: bytes) -> bool:
    """Whether an image's header announces so many pixels that only one such is decoded at a time."""
    with contextlib.suppress(Exception), Image.open(io.BytesIO(data)) as opened:  # decode says what is wrong with it
        return opened.width * opened.height > LARGE_PIXELS
    return False


def column(names: list[Any]) -> Any:
    """Return the images' column: the pyfunc takes the first, so that is it where none has the name."""
    return next((name for name in names if name == COLUMN), names[0] if names else COLUMN)


def is_header(names: list[str], followed: bool) -> bool:
    # Without a line of names, the first image would be taken for one, and be lost.
    return max(map(len, names)) <= HEADER and (followed or COLUMN in names)


def samples(preprocess: Preprocess, count: int) -> list[Array]:
    random = np.random.default_rng(0)
    return list(random.integers(0, 256, (count, preprocess.size, preprocess.size, 3), np.uint8))


# ---- to the pyfunc -------------------------------------------------------------------------------------------------------------


def from_table(table: "pd.DataFrame") -> list[Any]:
    return list(table.iloc[:, 0].tolist())


def from_python(value: Any, preprocess: Preprocess) -> Array:
    """Return the pixels of bytes, base64 text, a path or an array."""
    if isinstance(value, np.ndarray):
        return fit(to_rgb(Image.fromarray(value)), preprocess)
    if isinstance(value, str):
        path = Path(value)
        # A path has a suffix or a separator that is rare in base64 of an image, which is long: text that names a file is a file.
        if len(value) < 4096 and path.is_file():
            value = path.read_bytes()
        else:
            try:
                value = base64.b64decode(value, validate=True)
            except binascii.Error:
                raise ValueError("is neither a file nor base64") from None
    if not isinstance(value, (bytes, bytearray, memoryview)):
        raise ValueError(f"is a {type(value).__name__}; give bytes, base64 text, a path or an array")
    return fit(decode(bytes(value)), preprocess)


def example_table() -> "pd.DataFrame":
    """Return two small PNG images as a table."""
    import pandas as pd

    pictures = []
    for shade in (64, 192):
        buffer = io.BytesIO()
        Image.new("RGB", (16, 16), (shade, shade, shade)).save(buffer, "PNG")
        pictures.append(buffer.getvalue())
    return pd.DataFrame({COLUMN: pictures})


def size_in_words(preprocess: dict[str, Any]) -> str:
    return f"at {preprocess['size']} pixels"
