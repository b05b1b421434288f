"""One image: from bytes to the uint8 array that a network takes. Training, evaluation and service all call these two functions."""

import contextlib
import io
import math
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, ImageOps
from pydantic import BaseModel, ConfigDict

from graftwork.modality import BrokenExampleError

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[np.uint8]
INTERPOLATION = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


LIBRARIES = ("timm", "pillow")  # on whose versions an image model depends
PIXELS_AT_ONCE = {"cpu": 64 * 96 * 96, "cuda": 256 * 224 * 224, "mps": 64 * 224 * 224}


class BrokenImageError(BrokenExampleError):
    """The bytes are not an image that can be used; the text is the reason, in a few words."""


class Examined(NamedTuple):
    """What one look at an encoded image tells."""

    width: int  # pixels, upright
    height: int
    mode: str  # Pillow's, as found
    small: Image.Image  # RGB, upright; of at least ``look`` pixels a side where the image has them
    scaled: bytes | None  # encoded anew, where the image was larger than the bound
    suffix: str  # of ``scaled``


class Preprocess(BaseModel):
    """How an image becomes a network's input: size in pixels, then ``(x / 255 - mean) / std`` a channel."""

    model_config = ConfigDict(frozen=True)

    size: int
    resize: Literal["crop", "squash", "pad"] = "crop"
    crop_pct: float = 1.0
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    # As graftwork.modality.Preprocess says.

    def example(self, data: bytes, limit: int = 0) -> Array:
        return fit(decode(data, limit) if limit else decode(data), self)

    def stack(self, examples: Sequence[Array]) -> "torch.Tensor":
        import torch

        return torch.from_numpy(np.stack(examples))

    def to_input(self, batch: "torch.Tensor", device: "torch.device") -> "torch.Tensor":
        """Turn uint8 images of shape (N, H, W, 3) into the network's input: float32 (N, 3, H, W), normalised, channels last in memory."""
        import torch

        x = batch.to(device, non_blocking=True).permute(0, 3, 1, 2).float()
        mean = torch.tensor(self.mean, device=device).mul(255).view(1, 3, 1, 1)
        std = torch.tensor(self.std, device=device).mul(255).view(1, 3, 1, 1)
        return x.sub_(mean).div_(std)

    def lengths(self, batch: "torch.Tensor") -> None:
        return None

    @property
    def example_bytes(self) -> int:
        return 3 * self.size**2

    @property
    def at_once(self) -> dict[str, int]:
        return {
            device: int(max(8, 2 ** round(math.log2(pixels / self.size**2))))
            for device, pixels in PIXELS_AT_ONCE.items()
        }

    def options(self, device: str) -> dict[str, tuple[str, ...]]:
        # The largest gains come first: the budget may end before the rest.
        engines = ("eager", "traced", "compiled") if device == "cpu" else ("eager", "compiled")
        return {"engine": engines, "memory_format": ("channels_last", "contiguous")}

    @property
    def shape_key(self) -> str:
        return str(self.size)

    def files(self) -> dict[str, bytes]:
        return {}


def read_preprocess(values: dict[str, Any], folder: Path) -> Preprocess:
    """Return the Preprocess that a ``model.json`` describes; nothing of it lies elsewhere in ``folder``."""
    return Preprocess(**values)


def decode(data: bytes, max_pixels: int = 100_000_000) -> Image.Image:
    """Decode ``data`` whatever its mode into an upright RGB image.

    EXIF rotation is applied, transparency is laid on white, 16-bit and float grey is scaled to 8 bits, the first frame of an animation counts.

    Raises:
        BrokenImageError: the bytes are empty, no image, cut off, damaged, or hold more than ``max_pixels`` pixels.
    """
    if not data:
        raise BrokenImageError("zero bytes")
    guard(max_pixels)
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data)) as opened:
            refuse_unloaded(opened, max_pixels)
            opened.load()
            return to_rgb(ImageOps.exif_transpose(opened))
    except BrokenImageError:
        raise
    except Image.DecompressionBombError as error:
        raise BrokenImageError(f"more than {max_pixels:,} pixels") from error
    except (
        Exception
    ) as error:  # Pillow's decoders raise OSError, ValueError, SyntaxError, struct.error, ... on hostile bytes
        raise broken(error) from error


# Images of so many pixels are decoded one at a time, whatever the number of threads; in processes, they share another lock.
LARGE: contextlib.AbstractContextManager[Any] = threading.Lock()
LARGE_PIXELS = 16_000_000
ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)  # EXIF


def examine(data: bytes, max_pixels: int = 100_000_000, max_side: int = 0, look: int = 64) -> Examined:
    """Decode all of ``data``, since a header tells nothing of a file that was cut off, and say what it holds.

    A JPEG is decoded at a fraction of its size, which still reads every coefficient. An image whose shorter side exceeds ``max_side`` pixels
    (0: any may) is scaled down to that, and encoded anew: a JPEG as JPEG of quality 95, others as PNG.

    Raises:
        BrokenImageError: as ``decode``.
    """
    if not data:
        raise BrokenImageError("zero bytes")
    guard(max_pixels)
    try:
        with Image.open(io.BytesIO(data)) as opened:
            refuse_unloaded(opened, max_pixels)
            pixels, mode = opened.width * opened.height, opened.mode
            width, height = opened.size
            if opened.getexif().get(ORIENTATION) in SIDEWAYS:
                width, height = height, width
            large = bool(max_side) and min(width, height) > max_side
            jpeg = opened.format in ("JPEG", "MPO")
            if jpeg and mode in ("L", "RGB"):
                side = max_side if large else look
                ratio = side / min(width, height)
                opened.draft(mode, (max(1, int(opened.width * ratio)), max(1, int(opened.height * ratio))))
            with LARGE if pixels > LARGE_PIXELS else contextlib.nullcontext():
                opened.load()
                image = to_rgb(ImageOps.exif_transpose(opened))
            if not large:
                return Examined(width, height, mode, image, None, "")
            ratio = max_side / min(width, height)
            image = image.resize(
                (round(width * ratio), round(height * ratio)), Image.Resampling.LANCZOS, reducing_gap=3.0
            )
            buffer = io.BytesIO()
            if jpeg:
                image.save(buffer, "JPEG", quality=95)
            else:
                image.save(buffer, "PNG", compress_level=1)
            return Examined(width, height, mode, image, buffer.getvalue(), ".jpg" if jpeg else ".png")
    except BrokenImageError:
        raise
    except Image.DecompressionBombError as error:
        raise BrokenImageError(f"more than {max_pixels:,} pixels") from error
    except Exception as error:  # as in decode
        raise broken(error) from error


def refuse_unloaded(opened: Image.Image, max_pixels: int) -> None:
    """Refuse, by the header alone, what must not be decoded.

    Raises:
        BrokenImageError: it is too large, or PostScript: a program, which Pillow would have another program run.
    """
    if opened.width * opened.height > max_pixels:
        raise BrokenImageError(f"{opened.width} x {opened.height} pixels, more than {max_pixels:,}")
    if opened.format == "EPS":
        raise BrokenImageError("PostScript, which is a program and no image")


def guard(max_pixels: int) -> None:
    """Set Pillow's own guards. Ours reads the size from the header, before a pixel is unpacked.

    What Pillow opens inside a container (a PNG in an icon) only Pillow's guard sees; it raises above twice this number.
    """
    Image.MAX_IMAGE_PIXELS = (max_pixels + 1) // 2
    ImageFile.LOAD_TRUNCATED_IMAGES = False


REASONS = {  # by what Pillow says, in small letters
    "cannot identify": "not an image",
    "truncated": "cut off",
    "but only got": "cut off",
    "max_text": "holds a text or a colour profile that unpacks to too much",
    "data stream": "damaged",
    "could not create decoder": "damaged",
}


def broken(error: Exception) -> BrokenImageError:
    text = str(error) or type(error).__name__
    return BrokenImageError(next((reason for words, reason in REASONS.items() if words in text.lower()), text))


def to_rgb(image: Image.Image) -> Image.Image:
    """Return ``image``, of any mode, as 8-bit RGB."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.nan_to_num(np.asarray(image, dtype=np.float64))
        # Float images are in 0..1 by convention; integer ones of these modes come from 16-bit files.
        scale = 255.0 if image.mode == "F" and grey.max(initial=0) <= 1 else 1.0 if image.mode == "F" else 1 / 257
        return Image.fromarray((grey * scale).clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def fit(image: Image.Image, preprocess: Preprocess) -> Array:
    """Resize ``image`` to the network's input: an array of shape (size, size, 3), uint8, RGB."""
    size, method = preprocess.size, INTERPOLATION[preprocess.interpolation]
    if preprocess.resize == "squash":
        return np.asarray(image.resize((size, size), method))
    if preprocess.resize == "pad":
        # The border has the mean colour: zeros, once normalised, as the network's own padding has.
        colour = tuple(round(255 * m) for m in preprocess.mean)
        return np.asarray(ImageOps.pad(image, (size, size), method, colour))
    # The centre square is cut by the resize itself (box=), so nothing outside it is ever scaled.
    side = min(image.size) * preprocess.crop_pct
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return np.asarray(image.resize((size, size), method, box=(left, top, left + side, top + side)))
