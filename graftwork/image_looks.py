"""What an image is like: for packing, validation, drift and slices. See ``graftwork.modality.Looks``."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from graftwork.duplicates import SIDE
from graftwork.modality import Index, Looker
from graftwork.settings import IngestSettings, ValidateSettings

if TYPE_CHECKING:
    from graftwork.dataset import Dataset

NOUN = "image"
HINT = "give images that a viewer opens"
RECIPE = "1"  # of how an image is packed; another number packs everything again
SIGNATURE = pa.schema(
    [
        ("thumb", pa.binary(SIDE * SIDE)),  # grey, SIDE x SIDE, uint8
        ("colour", pa.binary(3)),  # mean red, green and blue
        ("brightness", pa.float32()),  # mean grey, 0..255
        ("contrast", pa.float32()),  # standard deviation of the thumbnail's grey
        ("saturation", pa.float32()),  # mean of the largest less the smallest channel
    ]
)
LOOKS = ("brightness", "contrast", "saturation")
COLUMNS = ("side", *LOOKS, "aspect")
SLICES = ("side", *LOOKS)
SIZE = ("side", "Shorter side, pixels")
EDGES: dict[str, npt.NDArray[np.float64]] = {
    "brightness": np.linspace(0, 256, 17),
    "contrast": np.linspace(0, 128, 17),
    "saturation": np.linspace(0, 256, 17),
    # Sides and aspects are ratios: their scale is logarithmic.
    "side": np.geomspace(8, 16384, 12),
    "aspect": np.geomspace(1 / 8, 8, 13),
}
MEASURES = {
    "brightness": "brightness of the images",
    "contrast": "contrast of the images",
    "saturation": "saturation of the images",
    "side": "sizes of the images",
    "aspect": "shapes of the images",
}
NEAR = "look like one in another split, scaled, cropped or encoded anew"
EIGHT_BITS = ["1", "L", "P", "RGB", "RGBA", "LA", "PA", "La", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"]


def recipe(settings: IngestSettings) -> str:
    return f"{RECIPE}-{SIDE}-{settings.max_side}-{settings.max_pixels}"


def lookers(settings: IngestSettings, lock: Path) -> AbstractContextManager[Looker]:
    from graftwork.decoders import Decoders
    from graftwork.parallel import WORKERS

    return Decoders(WORKERS, settings.max_pixels, settings.max_side, lock)


def measures(dataset: "Dataset") -> dict[str, npt.NDArray[Any]]:
    width, height = (dataset.manifest[k].to_numpy().astype(np.float64) for k in ("width", "height"))
    signatures = dataset.signatures(list(LOOKS))
    values = {name: signatures[name].to_numpy() for name in signatures.column_names}
    return values | {"side": np.minimum(width, height), "aspect": width / height}


def columns(dataset: "Dataset", rows: pa.Table) -> pd.DataFrame:
    """Return side (the shorter, in pixels), aspect (longer by shorter), brightness, contrast and saturation of ``rows``."""
    # What the manifest says of these rows alone: a dataset of them has their signatures, in their order.
    found = dataset._replace(manifest=rows).signatures(list(LOOKS)).to_pandas()
    sides = rows.select(["width", "height"]).to_pandas()
    found["side"] = sides.min(axis=1)
    found["aspect"] = sides.max(axis=1) / found["side"]
    return found[list(COLUMNS)]


def near_duplicates(dataset: "Dataset", split: Index, content: Index) -> tuple[Index, Index]:
    """Return rows that look like a row of another split, each once, and that row; the surest first."""
    from graftwork import duplicates

    looks = dataset.signature_bytes({"thumb": duplicates.SIDE**2, "colour": 3})
    found = duplicates.near_duplicates(looks["thumb"], looks["colour"], split.astype(np.int8), content)
    rows, partners = np.r_[found.first, found.second], np.r_[found.second, found.first]
    order = np.argsort(-np.r_[found.score, found.score], kind="stable")
    rows, partners = rows[order], partners[order]
    _, once = np.unique(rows, return_index=True)
    once.sort()
    return rows[once], partners[once]


def rules(examples: pd.DataFrame, settings: ValidateSettings, rule: Any, rows: Any) -> list[Any]:
    import great_expectations.expectations as gxe

    between = gxe.ExpectColumnValuesToBeBetween
    broken = ~examples["decodable"].astype(bool)
    return [
        rule(
            "size",
            "warning",
            "examples",
            between(column="side", min_value=settings.min_side),
            f"{{count}} images have a side under {settings.min_side} pixels ({{examples}})",
            rows(examples["side"] < settings.min_side, "side"),
        ),
        rule(
            "aspect",
            "warning",
            "examples",
            between(column="aspect", max_value=settings.max_aspect),
            f"{{count}} images are more than {settings.max_aspect:g} times as long as wide ({{examples}}): a square crop shows little of them",
            rows(examples["aspect"] > settings.max_aspect, "aspect", descending=True),
        ),
        rule(
            "mode",
            "warning",
            "examples",
            gxe.ExpectColumnValuesToBeInSet(column="mode", value_set=EIGHT_BITS),
            "{count} images have more than 8 bits a channel ({examples}): they are reduced to 8",
            rows(~broken & ~examples["mode"].isin(EIGHT_BITS)),
        ),
        rule(
            "not_blank",
            "warning",
            "examples",
            between(column="contrast", min_value=settings.min_contrast),
            "{count} images are blank or nearly of one colour ({examples}); remove them, or lower min_contrast",
            rows(examples["contrast"] < settings.min_contrast, "contrast"),
        ),
    ]


def card(dataset: "Dataset", row: int, side: int = 112) -> dict[str, str]:
    """Return the picture in a row of the manifest as a data URI, at most ``side`` pixels; "" if it cannot be read."""
    import base64
    import io

    from graftwork.images import BrokenImageError, decode

    try:
        data = next(dataset.read(dataset.manifest.slice(row, 1)))
        image = decode(data)
    except (OSError, BrokenImageError):
        return {"picture": ""}
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return {"picture": f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"}
