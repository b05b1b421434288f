"""Images: every mode a camera, a scanner or a web page may leave, what is refused and how, and the geometry of the network's input."""

import functools
import io
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile
from pydantic import ValidationError

from graftwork.images import BrokenImageError, Preprocess, decode, fit

WHITE = (255, 255, 255)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(width: int = 40, height: int = 30, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def filled(mode: str, colour: object) -> Image.Image:
    return Image.new(mode, (6, 4), colour)


def palette(colour: tuple[int, int, int]) -> Image.Image:
    image = filled("P", 1)
    image.putpalette([0, 0, 0, *colour])
    return image


def grey(values: float, dtype: str) -> Image.Image:
    return Image.fromarray(np.full((4, 6), values, dtype=dtype))


def preprocess(size: int, **options: object) -> Preprocess:
    return Preprocess(size=size, mean=(0, 0, 0), std=(1, 1, 1), **options)


MODES = {
    "L": (lambda: encoded(filled("L", 100)), (100, 100, 100)),
    "L with a transparent grey": (lambda: encoded(filled("L", 7), transparency=7), WHITE),
    "LA, half": (lambda: encoded(filled("LA", (100, 128))), (177, 177, 177)),
    "LA, clear": (lambda: encoded(filled("LA", (0, 0))), WHITE),
    "P": (lambda: encoded(palette((10, 200, 30))), (10, 200, 30)),
    "P with a clear index": (lambda: encoded(palette((10, 200, 30)), transparency=1), WHITE),
    "P with an alpha an index": (lambda: encoded(palette((0, 0, 0)), transparency=b"\xff\x80"), (127, 127, 127)),
    "P, as GIF with a clear index": (lambda: encoded(palette((10, 200, 30)), "GIF", transparency=1), WHITE),
    "RGB": (lambda: encoded(filled("RGB", (1, 2, 3))), (1, 2, 3)),
    "RGB with a transparent colour": (lambda: encoded(filled("RGB", (255, 0, 0)), transparency=(255, 0, 0)), WHITE),
    "RGBA, solid": (lambda: encoded(filled("RGBA", (1, 2, 3, 255))), (1, 2, 3)),
    "RGBA, half": (lambda: encoded(filled("RGBA", (200, 0, 0, 128))), (227, 127, 127)),
    "RGBA, clear": (lambda: encoded(filled("RGBA", (0, 0, 0, 0))), WHITE),
    "CMYK, as TIFF": (lambda: encoded(filled("CMYK", (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
    "CMYK, as JPEG": (lambda: encoded(filled("CMYK", (0, 255, 255, 0)), "JPEG", quality=95), (255, 0, 0)),
    "I;16, as PNG": (lambda: encoded(grey(32768, "uint16")), (128, 128, 128)),
    "I;16, white": (lambda: encoded(grey(65535, "uint16")), WHITE),
    "I;16, as TIFF": (lambda: encoded(grey(25700, "uint16"), "TIFF"), (100, 100, 100)),
    "I;16B": (lambda: encoded(Image.frombytes("I;16B", (6, 4), b"\x64\x64" * 24), "TIFF"), (100, 100, 100)),
    "I": (lambda: encoded(grey(25700, "int32"), "TIFF"), (100, 100, 100)),
    "I, below zero": (lambda: encoded(grey(-5, "int32"), "TIFF"), (0, 0, 0)),
    "F in 0..1": (lambda: encoded(grey(0.4, "float32"), "TIFF"), (102, 102, 102)),
    "F in 0..255": (lambda: encoded(grey(100, "float32"), "TIFF"), (100, 100, 100)),
    "F, not a number": (lambda: encoded(grey(np.nan, "float32"), "TIFF"), (0, 0, 0)),
    "F, above": (lambda: encoded(grey(1e9, "float32"), "TIFF"), WHITE),
    "1, white": (lambda: encoded(filled("1", 1)), WHITE),
    "1, black": (lambda: encoded(filled("1", 0)), (0, 0, 0)),
    "YCbCr": (lambda: encoded(filled("YCbCr", (76, 85, 255)), "TIFF"), (254, 0, 0)),
    "LAB": (lambda: encoded(filled("LAB", (200, 128, 128)), "TIFF"), (194, 194, 194)),
    "animated GIF": (
        lambda: encoded(
            palette((250, 0, 0)), "GIF", save_all=True, append_images=[palette((0, 0, 250)), palette((0, 250, 0))]
        ),
        (250, 0, 0),
    ),
    "animated WebP": (
        lambda: encoded(
            filled("RGB", (250, 0, 0)), "WEBP", save_all=True, append_images=[filled("RGB", (0, 0, 250))], lossless=True
        ),
        (250, 0, 0),
    ),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_becomes_the_rgb_that_a_viewer_shows(name: str) -> None:
    """A user would train on colours that are not those of the pictures: black or white squares in place of them."""
    make, expected = MODES[name]
    image = decode(make())
    assert image.mode == "RGB" and image.size == (6, 4)
    assert np.abs(np.asarray(image, dtype=int) - expected).max() <= 3


def test_sixteen_bits_keep_their_whole_range() -> None:
    """A user's X-ray or depth map would be one white or one black surface."""
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)[None].repeat(2, 0)
    found = np.asarray(decode(encoded(Image.fromarray(ramp))))
    assert (found == np.arange(256)[None, :, None]).all()


# Where row 0 and column 0 of the stored pixels lie in the upright picture, from the EXIF standard.
ORIENTATIONS = {
    1: ("top", "left"), 2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left"),
    5: ("left", "top"), 6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom"),
}  # fmt: skip


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_exif_orientation_is_applied(orientation: int, format: str) -> None:
    """A user's photographs, held upright by the camera, would reach the network lying on their side."""
    upright = np.zeros((32, 48, 3), dtype=np.uint8)
    upright[:16, :16], upright[:16, 16:], upright[16:, :16] = (220, 20, 20), (20, 220, 20), (20, 20, 220)
    row, column = ORIENTATIONS[orientation]
    stored = upright
    if row in ("left", "right"):
        stored = stored.transpose(1, 0, 2)
    if row in ("bottom", "right"):
        stored = stored[::-1]
    if column in ("bottom", "right"):
        stored = stored[:, ::-1]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
    found = np.asarray(decode(encoded(Image.fromarray(stored.copy()), format, exif=exif, **options)), dtype=int)
    assert found.shape == upright.shape
    assert np.abs(found - upright).max() < 30


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0garbage",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04abcd\0\0\0\0",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0",
    ],
)
def test_damaged_exif_costs_no_image(exif: bytes) -> None:
    """A user would lose photographs that every viewer opens, because a phone or an editor wrote a bad tag."""
    assert decode(encoded(filled("RGB", (200, 10, 10)), "JPEG", exif=exif)).size == (6, 4)


JPEG, PNG = encoded(noise(), "JPEG"), encoded(noise())


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "zero bytes"),
        (JPEG[: len(JPEG) // 2], "cut off"),
        (PNG[: len(PNG) // 2], "cut off"),
        (JPEG[:20], "not an image|cut off"),
        (b"This is a text that somebody called photo.jpg\n", "not an image"),
        (b"<!DOCTYPE html><html>403 Forbidden</html>", "not an image"),
        (b"\0" * 4096, "not an image"),
        (PNG[:60] + bytes(20) + PNG[80:], "."),
    ],
    ids=["empty", "half a JPEG", "half a PNG", "a JPEG's header", "text", "web page", "zeros", "damaged PNG"],
)
def test_what_is_no_image_is_refused_with_a_reason(data: bytes, reason: str) -> None:
    """A user would train on half-grey pictures, or see a stack trace in place of the file's fault."""
    with pytest.raises(BrokenImageError, match=reason) as raised:
        decode(data)
    assert str(raised.value)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP", "PPM", "TGA", "ICO", "JPEG2000"])
def test_hostile_bytes_raise_nothing_else(format: str) -> None:
    """A user's run of a million images would end in a stack trace at the one whose bytes are odd."""
    whole = encoded(noise(16, 16), format)
    rng = random.Random(format)
    cuts = [whole[:n] for n in range(0, len(whole), max(1, len(whole) // 60))]
    for _ in range(150):
        flipped = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            # Damage is where the structure is: mostly in the first bytes.
            flipped[rng.randrange(min(len(whole), rng.choice([40, 200, 10**9])))] = rng.randrange(256)
        cuts.append(bytes(flipped))
    refused = 0
    for data in cuts:
        try:
            assert decode(data, max_pixels=1_000_000).mode == "RGB"
        except BrokenImageError:
            refused += 1
    assert refused > 0
    assert decode(whole).size == (16, 16)


def test_another_librarys_tolerance_is_not_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user whose process imports a library that tolerates cut-off files would train on their grey lower halves."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(BrokenImageError):
        decode(JPEG[: len(JPEG) // 2])


def test_an_image_may_have_max_pixels_and_no_more() -> None:
    """A user who sets max_pixels would lose images that are within it, or keep those beyond."""
    data = encoded(Image.new("L", (40, 25)))
    assert decode(data, max_pixels=1000).size == (40, 25)
    with pytest.raises(BrokenImageError, match="more than 999"):
        decode(data, max_pixels=999)
    with pytest.raises(BrokenImageError, match="more than 100"):
        decode(data, max_pixels=100)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@functools.cache
def png_bomb(side: int) -> bytes:
    """A grey PNG of side x side pixels, made without ever holding them."""
    packer = zlib.compressobj(6)
    rows = b"".join(packer.compress(bytes((side + 1) * 1000)) for _ in range(side // 1000)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


# The peak is read from /proc: getrusage's is never below that of the process which started this one.
MEASURE = """
import sys
from pathlib import Path
from graftwork.images import BrokenImageError, decode

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

data = sys.stdin.buffer.read()
before = peak()
try:
    decode(data)
    reason = "decoded"
except BrokenImageError as error:
    reason = str(error)
print((peak() - before) // 1024)
print(reason)
"""


def icon(png: bytes) -> bytes:
    """An icon that says 16 x 16 of the PNG in it."""
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(png), 22) + png


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
@pytest.mark.parametrize("wrap", [bytes, icon], ids=["PNG", "PNG in an icon"])
def test_a_decompression_bomb_is_refused_before_its_pixels_are_unpacked(wrap: Callable[[bytes], bytes]) -> None:
    """A user's machine would run out of memory on a file of a few hundred kilobytes: 144 million pixels."""
    bomb = wrap(png_bomb(12_000))
    assert len(bomb) < 1_000_000
    run = subprocess.run(
        [sys.executable, "-c", MEASURE], input=bomb, capture_output=True, timeout=60, check=True
    ).stdout.decode()
    grown, reason = run.splitlines()
    assert "pixels" in reason
    assert int(grown) < 50, f"{grown} MiB were unpacked"


def bands(width: int, height: int, at: int) -> Image.Image:
    """Red, green, blue along the longer side, of lengths ``at``, the rest, ``at``."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    along = pixels if height > width else pixels.transpose(1, 0, 2)
    along[:at, :, 0], along[at:-at, :, 1], along[-at:, :, 2] = 255, 255, 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize(("width", "height"), [(60, 20), (20, 60)])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_crop_takes_the_centre_square(width: int, height: int, interpolation: str) -> None:
    """A user would have stretched objects, or other pixels than those of the usual resize and centre crop."""
    image = bands(width, height, at=20)
    found = fit(image, preprocess(10, interpolation=interpolation))
    assert (found[4:6, 4:6] == (0, 255, 0)).all()
    resized = np.asarray(image.resize((width // 2, height // 2), Image.Resampling[interpolation.upper()]), dtype=int)
    usual = resized[:, 10:20] if width > height else resized[10:20]
    assert np.abs(found - usual).max() <= 1


@pytest.mark.parametrize(("width", "height"), [(60, 20), (20, 60)])
def test_squash_keeps_every_part(width: int, height: int) -> None:
    """A user who asks for squash because things lie at the border would lose them all the same."""
    found = fit(bands(width, height, at=20), preprocess(9, resize="squash", interpolation="nearest"))
    along = found if height > width else found.transpose(1, 0, 2)
    for part, colour in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255)]):
        assert (along[3 * part : 3 * part + 3] == colour).all()


@pytest.mark.parametrize(("width", "height"), [(60, 20), (20, 60)])
def test_pad_keeps_every_part_and_the_aspect(width: int, height: int) -> None:
    """A user who asks for pad because shapes matter would get them stretched, or a border that the network takes for a thing."""
    found = fit(bands(width, height, at=20), preprocess(9, resize="pad", interpolation="nearest"))
    along = found if height > width else found.transpose(1, 0, 2)
    for part, colour in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255)]):
        assert (along[3 * part : 3 * part + 3, 3:6] == colour).all()
    border = np.concatenate([along[:, :3], along[:, 6:]])
    assert (border == [round(255 * m) for m in preprocess(9).mean]).all(), "zeros, once normalised"


def test_crop_pct_is_the_share_of_the_shorter_side() -> None:
    """A user's backbone, evaluated by its authors at crop_pct 0.5, would see another cut of the picture."""
    image = Image.new("RGB", (80, 40), "red")
    image.paste((0, 255, 0), (30, 10, 50, 30))  # the centre 20 x 20
    assert (fit(image, preprocess(10, crop_pct=0.5, interpolation="nearest")) == (0, 255, 0)).all()
    wider = fit(image, preprocess(10, crop_pct=0.75, interpolation="nearest"))
    assert (wider[0] == (255, 0, 0)).all() and (wider[5, 5] == (0, 255, 0)).all()


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
@pytest.mark.parametrize("source", [(1, 1), (1, 500), (500, 1), (7, 3), (64, 64), (300, 200)])
@pytest.mark.parametrize("size", [1, 8, 64])
def test_fit_gives_the_networks_shape_whatever_comes(source: tuple[int, int], size: int, resize) -> None:
    """A user's batch could not be stacked: one odd image would end the run."""
    found = fit(Image.new("RGB", source, (9, 8, 7)), preprocess(size, resize=resize, crop_pct=0.875))
    assert found.shape == (size, size, 3) and found.dtype == np.uint8
    if resize != "pad":
        assert (found == (9, 8, 7)).all()


def test_interpolation_is_the_one_asked_for() -> None:
    """A user's backbone would get pictures that were resized in another way than those it was trained on."""
    image = noise(33, 33)
    found = {n: fit(image, preprocess(20, interpolation=n)).tobytes() for n in ("nearest", "bilinear", "bicubic")}
    assert len(set(found.values())) == 3
    checker = Image.fromarray(np.array([[[0] * 3, [255] * 3], [[255] * 3, [0] * 3]], dtype=np.uint8))
    assert set(np.unique(fit(checker, preprocess(7, interpolation="nearest")))) == {0, 255}
    assert len(np.unique(fit(checker, preprocess(7, interpolation="bilinear")))) > 2


@pytest.mark.parametrize("options", [{"interpolation": "area"}, {"resize": "stretch"}])
def test_an_unknown_way_to_resize_is_refused(options: dict[str, str]) -> None:
    """A user's slip of the pen would be found only when the first image is read, or never."""
    with pytest.raises(ValidationError):
        preprocess(8, **options)
