"""Bad input for the real command: each case is what a user types, what it must answer, and a world of small files to do it in.

``test_bad_input.py`` asserts them; ``bad_input_table.py`` prints what they answered.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import kfp_server
import numpy as np
import psutil
from PIL import Image

TINY = "test_resnet.r160_in1k"
CLASSES = {"plain": (200, 40, 40), "two words": (40, 200, 40), 'l\'été "猫" [red]\nline': (40, 40, 200)}
STEPS = (
    "ingest_data",
    "validate_data",
    "extract_features",
    "train_baseline",
    "fine_tune",
    "evaluate_model",
    "register_model",
)
# What makes a step run again, while those before it are reused from the world's good run.
AGAIN = {
    "ingest_data": ["--set", "val_fraction=0.3"],
    "validate_data": ["--set", "min_side=9"],
    "extract_features": ["--set", "views=3"],
    "train_baseline": ["--set", "views=2"],
    "fine_tune": ["--set", "label_smoothing=0.2"],
    "evaluate_model": ["--set", "resamples=200"],
    "register_model": [],
}


class CannotTryError(Exception):
    """This machine cannot show the case; the text says why."""


class Result(NamedTuple):
    status: int
    stdout: str
    stderr: str


class Tried(NamedTuple):
    result: Result
    folders: list[Path]  # of the runs that it made in the world's output


class World:
    """A folder with everything that the cases need; the costly parts are made when they are first asked for."""

    def __init__(self, root: Path, weights: Path) -> None:
        self.root, self.weights = root, weights
        self.stack = contextlib.ExitStack()
        self.broken: list[str] = []
        self.tried: dict[str, Tried] = {}

    def path(self, name: str, content: bytes | str | None = None) -> Path:
        """Return ``name`` under the world's folder; with ``content``, as a file."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def folder(self, name: str, *files: str, mode: int = 0o755) -> Path:
        """Return a folder that holds ``files``, each a small image."""
        folder = self.root / name
        for n, file in enumerate(files):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture((60 * (n % 4), 90, 130), n)).save(folder / file)
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(mode)
        return folder

    @cached_property
    def plain(self) -> Path:
        """A sound folder of two classes."""
        return self.folder("sound", *(f"{label}/{n}.png" for label in ("a", "b") for n in range(4)))

    @cached_property
    def odd(self) -> Path:
        """A folder of three classes with everything in it that has to work, and six broken images (``self.broken``)."""
        root = self.root / 'it\'s a "data" set, é {x} 100% [b]'
        for number, (label, colour) in enumerate(CLASSES.items()):
            (root / label).mkdir(parents=True, exist_ok=True)
            for n in range(12):
                Image.fromarray(picture(colour, 100 * number + n)).save(root / label / f"{n:02d}.png")
        paint_modes(root)
        paint_names(root / "two words")
        (root / "plain/up").symlink_to("..")
        (root / "again").symlink_to(".")
        (root / "two words/itself").symlink_to("itself")
        self.broken = paint_broken(root / "plain")
        return root

    @cached_property
    def kfp(self) -> kfp_server.Server:
        """A Kubeflow Pipelines server with a login."""
        return self.stack.enter_context(kfp_server.serve(token="right"))

    @property
    def network(self) -> list[str]:
        return ["--backbone", TINY, "--weights", str(self.weights), "--image-size", "32", "--epochs", "1"]

    @cached_property
    def output(self) -> Path:
        return self.root / "output"

    @property
    def good_command(self) -> list[str]:
        """A run that works; what is appended may break it. The steps before the break are reused from the first."""
        return ["run", "--data", str(self.odd), *self.network, "--set", "max_broken=0.2", "--output", str(self.output)]

    @cached_property
    def good(self) -> Result:
        """The one whole run."""
        return self.command(*self.good_command, timeout=240)

    @cached_property
    def good_folder(self) -> Path:
        assert self.good.status == 0, self.good
        return next(self.output.glob("*/summary.json")).parent

    @cached_property
    def model(self) -> Path:
        """A Model folder."""
        return Path(json.loads((self.good_folder / "summary.json").read_text(encoding="utf-8"))["files"]["baseline"])

    def file(self, name: str, text: str) -> Path:
        path = self.root / name
        path.write_text(text, encoding="utf-8")
        return path

    @cached_property
    def registered(self) -> str:
        return str(json.loads((self.good_folder / "summary.json").read_text(encoding="utf-8"))["registered"]["name"])

    def environment(self) -> dict[str, str]:
        kept = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("MLFLOW_", "GRAFTWORK_", "KFP_", "KF_", "COVERAGE_"))
        }
        return {**kept, "XDG_CACHE_HOME": str(self.root / "cache"), "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}

    def command(self, *args: str, prefix: tuple[str, ...] = (), timeout: float = 120) -> Result:
        """Run ``graftwork ARGS`` to its end, with the world's folder as the current one."""
        done = subprocess.run(
            [*prefix, sys.executable, "-m", "graftwork.pipelines.cli", *args],
            cwd=self.root,
            env=self.environment(),
            capture_output=True,
            timeout=timeout,
            check=False,
        )
        return Result(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))

    def start(self, *args: str) -> "subprocess.Popen[bytes]":
        """Start ``graftwork ARGS`` in a process group of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "graftwork.pipelines.cli", *args],
            cwd=self.root,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )


# ---- images --------------------------------------------------------------------------------------------------------------------


def picture(colour: tuple[int, int, int], seed: int) -> Any:
    """Return noise around a colour, 40 x 48 pixels: classes that any network tells apart."""
    noise = np.random.default_rng(seed).integers(-25, 25, (40, 48, 3))
    return np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)


MODES = ("cmyk.jpg", "cmyk.tif", "grey16.png", "float.tif", "palette.png", "palette-alpha.gif", "alpha.png",
         "grey-alpha.png", "one-bit.png", "rotated.jpg", "animated.gif", "photo.webp")  # fmt: skip


def paint_modes(root: Path) -> None:
    """Write the images of ``MODES`` into the class ``plain``."""
    folder, image = root / "plain", Image.fromarray(picture(CLASSES["plain"], 50))
    grey = np.asarray(image.convert("L"))
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.convert("CMYK").save(folder / "cmyk.tif")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "grey16.png")
    Image.fromarray(grey.astype(np.float32) / 255).save(folder / "float.tif")
    image.quantize(16).save(folder / "palette.png")
    image.quantize(15).save(folder / "palette-alpha.gif", transparency=3)
    alpha = image.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(image.size))
    alpha.save(folder / "alpha.png")
    alpha.convert("LA").save(folder / "grey-alpha.png")
    image.convert("1").save(folder / "one-bit.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(folder / "rotated.jpg", exif=exif)
    image.save(folder / "animated.gif", save_all=True, append_images=[image.rotate(90)])
    image.save(folder / "photo.webp")


NAMES = ("with space.png", "o'clock \"x\".png", "größe 猫 🐈.png", "line\nbreak.png", "-rf.png", "a%20b#c?.png",
         "{{x}}.png", "[bold]x.png", "UPPER.PNG")  # fmt: skip


def paint_names(folder: Path) -> None:
    for n, name in enumerate(NAMES):
        Image.fromarray(picture(CLASSES["two words"], 300 + n)).save(folder / name)
    with contextlib.suppress(OSError):  # file systems that hold UTF-8 names alone
        shutil.copy(folder / "00.png", os.fsencode(folder) + b"/bytes-\xff.png")


def bomb(width: int = 60_000, height: int = 60_000) -> bytes:
    """Return a PNG of a few bytes that says it is huge."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def paint_broken(folder: Path) -> list[str]:
    """Write broken images and return their names."""
    Image.fromarray(picture((9, 99, 9), 77)).resize((200, 200)).save(folder / "whole.jpg")
    whole = (folder / "whole.jpg").read_bytes()
    (folder / "whole.jpg").unlink()
    (folder / "zero.png").write_bytes(b"")
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("<html>404 Not Found</html>", encoding="utf-8")
    (folder / "bomb.png").write_bytes(bomb())
    (folder / "gone.png").symlink_to("nowhere.png")
    (folder / "loop.png").symlink_to("loop.png")
    return ["zero.png", "cut.jpg", "text.png", "bomb.png", "gone.png", "loop.png"]


# ---- weights -------------------------------------------------------------------------------------------------------------------


def wrong_shape(w: World) -> str:
    """Return weights with the right names, one tensor of another shape."""
    from safetensors.numpy import load_file, save_file

    state = load_file(w.weights)
    name = next(k for k, v in state.items() if v.ndim == 4)
    state[name] = np.zeros((3, 3, 3, 3), np.float32)
    save_file(state, w.path("shape.safetensors"))
    return str(w.path("shape.safetensors"))


class Evil:
    """Unpickled, it makes a file: what a malicious weights file could do with the user's rights."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def marker(w: World) -> Path:
    return w.root / "executed"


def evil(w: World) -> str:
    """Return weights in torch's format that run code when they are unpickled, after a proof that they would."""
    import torch

    path = w.path("evil.pth")
    torch.save({"weight": Evil(marker(w))}, path)
    torch.load(path, weights_only=False)  # the proof
    marker(w).rmdir()
    return str(path)


# ---- places --------------------------------------------------------------------------------------------------------------------


def unprivileged() -> tuple[str, ...]:
    """Return what goes before a command so that file permissions hold for it: nothing, or root without its rights over files."""
    if os.geteuid() != 0:
        return ()
    if not shutil.which("setpriv"):
        raise CannotTryError("the user is root, whom no permission stops, and there is no setpriv")
    dropped = "-dac_override,-dac_read_search"
    prefix = ("setpriv", f"--bounding-set={dropped}", f"--inh-caps={dropped}")
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        raise CannotTryError("the user is root, whom no permission stops, and setpriv may not change that here")
    return prefix


def tiny_disk(w: World, name: str, size: str, filled: bool = False) -> Path:
    """Return a folder that is a disk of ``size``; with ``filled``, without a free byte."""
    path = w.root / name
    path.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "graftwork-test", str(path)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        raise CannotTryError("a small disk can be mounted by root alone")
    w.stack.callback(subprocess.run, ["umount", "-l", str(path)], check=False, capture_output=True)
    if filled:
        (path / "run").mkdir()
        with contextlib.suppress(OSError), (path / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    return path


def noisy(w: World) -> Path:
    """Return a folder of images that do not compress: 6 MB."""
    for label in ("a", "b"):
        for n in range(10):
            path = w.path(f"noisy/{label}/{n}.bmp")
            Image.fromarray(
                np.random.default_rng([n, label == "a"]).integers(0, 255, (320, 320, 3)).astype(np.uint8)
            ).save(path)
    return w.root / "noisy"


def taken_port(w: World) -> str:
    held = w.stack.enter_context(socket.socket())
    held.bind(("127.0.0.1", 0))
    held.listen()
    return str(held.getsockname()[1])


# ---- the cases -----------------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """One mistake: what is typed, and what the one line on stderr has to hold (what is wrong, where, what to do)."""

    name: str
    args: Callable[[World], list[str]]
    says: tuple[str, ...]
    status: int = 2
    bare: bool = False  # for which root must be without its rights over files


def run_on(data: Callable[[World], object], *more: str) -> Callable[[World], list[str]]:
    return lambda w: ["run", "--data", str(data(w)), *w.network, "--output", str(w.root / "refused"), *more]


def failing_on(data: Callable[[World], object]) -> Callable[[World], list[str]]:
    return lambda w: ["run", "--data", str(data(w)), *w.network, "--output", str(w.output)]


def plain_run(*more: str) -> Callable[[World], list[str]]:
    return lambda w: ["run", "--data", str(w.plain), "--output", str(w.root / "refused"), *more]


def again(*more: str | Callable[[World], str]) -> Callable[[World], list[str]]:
    """The world's good run with something appended."""

    def args(w: World) -> list[str]:
        assert w.good.status == 0, w.good
        return [*w.good_command, *(m(w) if callable(m) else m for m in more)]

    return args


def predict(model: Callable[[World], object], *inputs: Callable[[World], object]) -> Callable[[World], list[str]]:
    return lambda w: ["predict", str(model(w)), *(str(one(w)) for one in inputs), "--output", str(w.output)]


def on_cluster(*words: str | Callable[[World], str], token: str = "right") -> Callable[[World], list[str]]:
    """A command for the world's KFP server, with a token in a file."""

    def args(w: World) -> list[str]:
        file = w.path(f"token-{token}", token)
        typed = [word(w) if callable(word) else word for word in words]
        return [*typed, "--host", w.kfp.host, "--token-file", str(file)]

    return args


def submit(*more: str | Callable[[World], str]) -> Callable[[World], list[str]]:
    return on_cluster("submit", "--data", "s3://bucket/photos", *more)


def schedule(*more: str) -> Callable[[World], list[str]]:
    return on_cluster("schedule", "create", "sundays", "--data", "s3://bucket/photos", "--cron", *more)


def nobody_listens(w: World) -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def good_image(w: World) -> Path:
    return w.plain / "a/0.png"


def tampered_model(w: World) -> Path:
    folder = w.root / "tampered"
    shutil.copytree(w.model, folder)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    return folder


def one_image_class(w: World) -> Path:
    return w.folder("one-image", *(f"many/{n}.png" for n in range(8)), "lonely/0.png")


def only_broken(w: World) -> Path:
    for label in ("a", "b"):
        w.path(f"only-broken/{label}/zero.png", b"")
    return w.root / "only-broken"


DATA = (
    Case(
        "a folder that is missing",
        run_on(lambda w: w.root / "no such"),
        ("no such folder", "no such", "check the path"),
    ),
    Case("an empty folder", run_on(lambda w: w.folder("empty")), ("no images found", "empty", "one folder a class")),
    Case(
        "empty class folders",
        run_on(lambda w: w.folder("hollow/a").parent),
        ("no images found", "hollow", "one folder a class"),
    ),
    Case(
        "files that are no images",
        run_on(lambda w: w.path("notes/a/readme.txt", "x").parent.parent),
        ("no images found (1 files", "notes", "one folder a class"),
    ),
    Case(
        "images outside class folders",
        run_on(lambda w: w.folder("flat", "1.png", "2.png")),
        ("outside a class folder", "flat", "CLASS/"),
    ),
    Case("a file", run_on(lambda w: w.path("photo.jpg", b"\xff\xd8")), ("is a file", "photo.jpg", "give the folder")),
    Case(
        "a folder that may not be read",
        run_on(lambda w: w.folder("locked", mode=0)),
        ("cannot be read (Permission denied)", "locked", "that you may read"),
        bare=True,
    ),
    Case(
        "a class folder that may not be read",
        run_on(lambda w: w.folder("half-locked/b", mode=0).parent),
        ("cannot be read (Permission denied)", "half-locked/b", "that you may read"),
        bare=True,
    ),
    Case(
        "one class",
        run_on(lambda w: w.folder("single", "cats/1.png", "cats/2.png")),
        ("only one class, 'cats'", "single", "at least two"),
    ),
    Case(
        "test and val without train",
        run_on(lambda w: w.folder("untrained", "test/a/1.png", "val/b/1.png")),
        ("no train folder", "untrained", "add train/"),
    ),
    Case(
        "an address that cannot be read",
        run_on(lambda w: "https://x.org/y.zip"),
        ("not of a kind that can be read", "x.org", "give a folder"),
    ),
    Case(
        "a path that is too long",
        run_on(lambda w: "x" * 5000),
        ("cannot be read", "File name too long", "give a folder"),
    ),
    Case(
        "a line break in a missing path",
        run_on(lambda w: w.root / "a\nTr [b]"),
        ("no such folder", r"a\nTr [b]", "check the path"),
    ),
)

OPTIONS = (
    Case(
        "a backbone that timm does not know",
        plain_run("--backbone", "resnet5O"),
        ("no such network", "'resnet5O'", "did you mean", "resnet50"),
    ),
    Case(
        "a backbone with a line break",
        plain_run("--backbone", "q\nq"),
        ("no such network", r"q\nq", "timm.list_models()"),
    ),
    Case(
        "weights that are missing",
        plain_run("--weights", "gone.safetensors"),
        ("no such file", "gone.safetensors", "give a"),
    ),
    Case(
        "--set with an unknown key",
        plain_run("--set", "batchsize=3"),
        ("no such setting", "'batchsize'", "did you mean batch_size"),
    ),
    Case(
        "--set with a key like nothing", plain_run("--set", "zzz=3"), ("no such setting", "'zzz'", "graftwork settings")
    ),
    Case(
        "--set with a bad value",
        plain_run("--set", "batch_size=many"),
        ("setting batch_size", "'many'", "valid integer"),
    ),
    Case(
        "--set with a value out of bounds",
        plain_run("--set", "max_broken=2"),
        ("setting max_broken", "2", "less than 1"),
    ),
    Case("--set with NaN", plain_run("--set", "weight_decay=NaN"), ("setting weight_decay", "nan", "finite")),
    Case("--set without =", plain_run("--set", "batch_size"), ("--set", "'batch_size'", "write KEY=VALUE")),
    Case("an option out of bounds", plain_run("--epochs=-1"), ("setting epochs", "-1", "greater than or equal to 0")),
    Case("an image size out of bounds", plain_run("--image-size", "99999"), ("setting image_size", "99999", "4096")),
    Case("an option that is no number", plain_run("--epochs", "many"), ("--epochs", "valid integer", "--help")),
    Case("a strategy that is none", plain_run("--strategy", "magic"), ("--strategy", "'magic'", "last-blocks")),
    Case("an option that is none", plain_run("--epoch", "3"), ("No such option", "--epoch", "--epochs")),
    Case("no --data", lambda w: ["run"], ("Missing option", "--data", "--help")),
    Case("a command that is none", lambda w: ["trian"], ("No such command", "trian", "--help")),
    Case(
        "an output folder that is a file",
        lambda w: ["run", "--data", str(w.plain), "--output", str(w.path("taken", "x"))],
        ("cannot be written", "taken", "another with --output"),
    ),
    Case(
        "an output folder that may not be written",
        lambda w: ["run", "--data", str(w.plain), *w.network, "--output", str(w.folder("sealed", mode=0o555))],
        ("cannot be written (Permission denied)", "sealed", "another with --output"),
        bare=True,
    ),
    Case(
        "compile into a folder that may not be written",
        lambda w: ["compile", "--output", str(w.folder("sealed", mode=0o555) / "p.yaml")],
        ("cannot be written (Permission denied)", "sealed/p.yaml", "another with --output"),
        bare=True,
    ),
    Case(
        "compile below a file",
        lambda w: ["compile", "--output", str(w.path("taken", "x") / "p.yaml")],
        ("cannot be written", "taken/p.yaml", "another with --output"),
    ),
    Case("compile to another suffix", lambda w: ["compile", "--output", "p.json"], ("p.json", "KFP wants", ".yaml")),
    Case(
        "ui on a port that is taken",
        lambda w: ["ui", "--output", str(w.path("ui/mlflow.db", "").parent), "--port", taken_port(w)],
        ("port", "cannot be used (Address already in use)", "another with --port"),
    ),
    Case(
        "ui where no run was",
        lambda w: ["ui", "--output", str(w.folder("empty"))],
        ("holds no runs", "empty", "run 'graftwork run'"),
    ),
    Case(
        "compare where no run was",
        lambda w: ["compare", "--output", str(w.folder("empty"))],
        ("there is none", "empty", "run 'graftwork run' first"),
    ),
)

PREDICT = (
    Case(
        "predict with a missing model",
        predict(lambda w: "no-model", good_image),
        ("no such folder", "no-model", "models:/NAME@champion"),
    ),
    Case(
        "predict with a folder that is no model",
        predict(lambda w: w.plain, good_image),
        ("is no Model folder", "sound", "give a Model folder"),
    ),
    Case(
        "predict with a model name half written",
        predict(lambda w: "models:/x", good_image),
        ("models:/x", "write models:/NAME@ALIAS"),
    ),
    Case(
        "predict without a registry",
        lambda w: ["predict", "models:/x@champion", str(good_image(w)), "--output", str(w.folder("empty"))],
        ("there is no registry", "empty", "--output"),
    ),
    Case(
        "predict with a missing alias",
        predict(lambda w: f"models:/{w.registered}@nobody", good_image),
        ("nobody not found", "the registry at", "; give"),
    ),
    Case(
        "predict a missing file",
        predict(lambda w: w.model, lambda w: "gone.png"),
        ("no such file", "gone.png", "check the path"),
    ),
    Case(
        "predict an empty folder",
        predict(lambda w: w.model, lambda w: w.folder("empty")),
        ("holds no images", "empty", "give"),
    ),
    Case(
        "predict with a damaged model",
        predict(tampered_model, good_image),
        ("damaged or replaced", "tampered", "train or fetch it again"),
    ),
    Case(
        "predict a broken image among good ones",
        predict(lambda w: w.model, good_image, lambda w: w.odd / "plain/cut.jpg", good_image),
        ("cut off", "plain/cut.jpg", "left out"),
        status=1,
    ),
)

SERVICE = (
    Case(
        "--policy with a missing file",
        plain_run("--policy", "gone.yaml"),
        ("policy gone.yaml", "cannot be read", "give a YAML file"),
    ),
    Case(
        "--policy with a rule that there is not",
        lambda w: plain_run("--policy", str(w.file("policy.yaml", "flor: 0.8\n")))(w),
        ("policy", "flor", "floor"),
    ),
    Case(
        "--policy with a value that is none",
        lambda w: plain_run("--policy", str(w.file("margin.yaml", "champion: {by: luck}\n")))(w),
        ("policy", "champion.by", "confidence"),
    ),
    Case(
        "slices of a folder by a column that it cannot have",
        again("--set", "slices=camera"),
        ("slices", "only a manifest", "brightness"),
        status=1,
    ),
    Case(
        "corruptions that there are not",
        plain_run("--set", "corruptions=fog"),
        ("corruptions", "fog", "gaussian-blur"),
    ),
    Case(
        "promote a model that there is not",
        lambda w: ["promote", "nobody", "1", "--reason", "why not", "--output", str(w.output)],
        ("nobody", "has no version 1", "graftwork history"),
    ),
    Case(
        "promote without a reason",
        lambda w: ["promote", w.registered, "1", "--output", str(w.output)],
        ("--reason", "--help"),
    ),
    Case(
        "rollback where there was no champion before",
        lambda w: ["rollback", w.registered, "--output", str(w.output)],
        ("has no champion before version 1", "graftwork promote"),
    ),
    Case(
        "history without a registry",
        lambda w: ["history", "x", "--output", str(w.folder("empty"))],
        ("there is none", "empty", "graftwork run"),
    ),
    Case(
        "serve a model that there is not",
        lambda w: ["serve", "no-model", "--port", "0", "--output", str(w.output)],
        ("no such folder", "no-model", "models:/NAME@champion"),
    ),
    Case(
        "export to a folder that cannot be written",
        lambda w: ["export", str(w.model), "--output", "/proc/model.onnx"],
        ("/proc/model.onnx", "cannot be written"),
    ),
)

CLUSTER = (
    Case(
        "submit to a host where nothing listens",
        lambda w: ["submit", "--data", "digits", "--host", nobody_listens(w)],
        ("cannot be reached: nothing listens there", "give the address", "kubectl port-forward"),
    ),
    Case(
        "submit without a host",
        lambda w: ["submit", "--data", "digits"],
        ("--host: is not given", "GRAFTWORK_KFP_HOST"),
    ),
    Case(
        "submit with a wrong token",
        on_cluster("submit", "--data", "digits", token="wrong"),
        ("the login is not taken (401)", "--token-file", "KFP_TOKEN"),
    ),
    Case(
        "submit with a token file that is missing",
        lambda w: ["submit", "--data", "digits", "--host", w.kfp.host, "--token-file", "gone"],
        ("token file gone", "cannot be read", "give the file"),
    ),
    Case(
        "submit a folder of this machine",
        on_cluster("submit", "--data", lambda w: str(w.plain)),
        ("sound", "lies on this machine, and a cluster cannot see it", "s3://bucket/prefix"),
    ),
    Case(
        "submit with a setting that there is not",
        submit("--set", "batchsize=3"),
        ("no such setting", "did you mean batch_size"),
    ),
    Case(
        "submit with a backbone that timm does not know",
        submit("--backbone", "resnet5O"),
        ("no such network", "'resnet5O'", "did you mean"),
    ),
    Case(
        "submit with a file of settings that is none",
        submit("--params", lambda w: str(w.path("list.yaml", "- epochs"))),
        ("list.yaml", "holds no settings", "NAME: VALUE"),
    ),
    Case(
        "submit with a policy over KFP's size",
        submit("--policy", lambda w: str(w.path("long.yaml", "floor: 0.8\n#" + "x" * 10_000))),
        ("setting policy", "KFP takes 10,000", "shorten it"),
    ),
    Case(
        "submit to a pool of GPUs that there is not",
        submit("--gpu-pool", "gcp"),
        ("gpu pool 'gcp'", "there is none of this name", "gke"),
    ),
    Case(
        "status of a run that there is not",
        on_cluster("status", "nobody"),
        ("'nobody'", "there is none", "graftwork status"),
    ),
    Case(
        "logs of a run that there is not",
        on_cluster("logs", "nobody"),
        ("'nobody'", "there is none", "graftwork status"),
    ),
    Case(
        "cancel a run that there is not",
        on_cluster("cancel", "nobody"),
        ("'nobody'", "there is none", "graftwork status"),
    ),
    Case(
        "schedule on 30 February",
        schedule("0 3 30 2 *"),
        ("'0 3 30 2 *'", "never fires", "change the day or the month"),
    ),
    Case("schedule with a weekday 7", schedule("0 3 * * 7"), ("'7' is no weekday", "Sunday is 0")),
    Case("schedule with words", schedule("every sunday"), ("has 2 fields", "write MINUTE HOUR DAY MONTH WEEKDAY")),
    Case(
        "schedule in a time zone that KFP cannot keep",
        schedule("0 3 * * 0", "--timezone", "Europe/Berlin"),
        ("Europe/Berlin", "KFP keeps its schedules in UTC", "--cluster-timezone"),
    ),
    Case(
        "schedule in a time zone that there is not",
        schedule("0 3 * * 0", "--timezone", "Europe/Berln"),
        ("'Europe/Berln'", "there is none of this name", "did you mean Europe/Berlin"),
    ),
    Case(
        "delete a schedule that there is not",
        on_cluster("schedule", "delete", "nobody"),
        ("'nobody'", "there is none of this name", "graftwork schedule list"),
    ),
)

FAILED = (
    Case(
        "more broken images than the share",
        again("--set", "max_broken=0.05"),
        ("step validate_data failed: decodable: 6 of", "plain/bomb.png", "mend or remove them"),
        status=1,
    ),
    Case(
        "nothing but broken images",
        failing_on(only_broken),
        ("step ingest_data failed", "none of its 2 images can be decoded", "give images"),
        status=1,
    ),
    Case(
        "a class with one image",
        failing_on(one_image_class),
        ("step validate_data failed: rows_per_class", "lonely", "add images"),
        status=1,
    ),
    Case(
        "weights of the wrong shape",
        again("--weights", wrong_shape),
        ("step extract_features failed", "(3, 3, 3, 3)", "shape.safetensors", "give the weights of this very network"),
        status=1,
    ),
    Case(
        "weights that are a malicious pickle",
        again("--weights", evil),
        ("step extract_features failed", "evil.pth", "refused", "save the state dict as .safetensors"),
        status=1,
    ),
    Case(
        "a disk that the data fill",
        lambda w: ["run", "--data", str(noisy(w)), *w.network, "--output", str(tiny_disk(w, "disk", "5m"))],
        ("step ingest_data failed", "disk full", "free some space and run again"),
        status=1,
    ),
    Case(
        "a disk without a free byte",
        lambda w: ["run", "--data", str(w.plain), "--output", str(tiny_disk(w, "full", "1m", filled=True) / "run")],
        ("cannot be written (No space left on device)", "full", "another with --output"),
    ),
)  # fmt: skip

CASES = (*DATA, *OPTIONS, *PREDICT, *SERVICE, *CLUSTER, *FAILED)


def try_case(w: World, case: Case) -> Tried:
    """Do once what ``case`` says; CannotTryError where this machine cannot show it."""
    if case.name not in w.tried:
        prefix = unprivileged() if case.bare else ()
        args = case.args(w)
        before = runs(w)
        w.tried[case.name] = Tried(w.command(*args, prefix=prefix), sorted(runs(w) - before))
    return w.tried[case.name]


def runs(w: World) -> set[Path]:
    return {journals.parent for journals in w.output.glob("*/journals")}


# ---- stopping a run ------------------------------------------------------------------------------------------------------------


class Stopped(NamedTuple):
    """What was left after a run was stopped."""

    result: Result
    folder: Path  # of the run
    alive: list[str]  # processes of the run that were still there
    left: list[str]  # files that look finished or half-made


def stop_in(
    w: World, step: str, number: signal.Signals, group: bool = False, until: str = "", tracked: bool = False
) -> Stopped:
    """Start a run, send a signal to the parent alone or to its group when ``step`` works, and wait for the end.

    With ``until``, the signal waits for that file in the run's folder; if ``tracked``, until MLflow has the run as well, which may be later.
    """
    command = again(*AGAIN[step])(w)
    before = runs(w)
    process = w.start(*command)
    try:
        folder = wait_for(w, process, before, step, until)
        while tracked and process.poll() is None:
            with contextlib.suppress(AssertionError, AttributeError):
                mlflow_statuses(w, folder)
                break
            time.sleep(0.05)
        session = members(process.pid)
        (os.killpg if group else os.kill)(process.pid, number)
        stdout, stderr = process.communicate(timeout=60)
        alive = [str(p) for p in {*session, *members(process.pid)} if p.is_running() and p.status() != "zombie"]
    finally:
        for left in members(process.pid):
            with contextlib.suppress(psutil.Error):
                left.kill()
        process.wait()
    left = [str(p.relative_to(folder)) for p in [*folder.rglob("*.partial*"), *folder.rglob("summary.json")]]
    result = Result(process.returncode, stdout.decode(errors="replace"), stderr.decode(errors="replace"))
    return Stopped(result, folder, alive, left)


def wait_for(w: World, process: Any, before: set[Path], step: str, until: str) -> Path:
    """Return the folder of the run that ``process`` is, once ``step`` works or the file ``until`` is there."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for folder in runs(w) - before:
            journal = folder / "journals" / f"{step}.jsonl"
            if (until and (folder / until).exists()) or (
                not until and journal.exists() and '"event": "working"' in journal.read_text(encoding="utf-8")
            ):
                return folder
        if process.poll() is not None:
            raise AssertionError(f"the run ended before {until or step}: {process.communicate()}")
        time.sleep(0.01)
    raise AssertionError(f"the run did not come to {until or step}")


def members(session: int) -> list[psutil.Process]:
    """Return the processes of ``session`` (its leader's id)."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == session:
                found.append(process)
    return found


def mlflow_statuses(w: World, folder: Path) -> tuple[str, dict[str, str]]:
    """Return the status of the run ``folder`` in MLflow, and those of its steps."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{w.output / 'mlflow.db'}"
    client = MlflowClient(uri, uri)
    experiment = client.get_experiment_by_name("graftwork")
    runs = client.search_runs([experiment.experiment_id], f"tags.`graftwork.run` = '{folder.name}'")
    parents = [r.info.status for r in runs if "graftwork.parent" in r.data.tags]
    nested = {r.data.tags["graftwork.step"]: r.info.status for r in runs if "graftwork.step" in r.data.tags}
    assert len(parents) == 1, parents
    return parents[0], nested
