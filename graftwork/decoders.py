"""Looking at images in processes of their own: Python's lock lets threads decode hardly faster than one of them would.

A process takes encoded images on its standard input and answers on its output. It ends when its input does, so none outlives the one that asked.
An image that ends its process (a defect of a decoder, memory) is a broken image, and another process takes the place.
"""

import contextlib
import json
import os
import queue
import signal
import struct
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import IO, Any

from graftwork import images as how_images
from graftwork.duplicates import SIDE, Signature, signature
from graftwork.errors import one_line
from graftwork.images import BrokenImageError, examine
from graftwork.modality import Looked

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

FEW = 512  # images that are looked at before processes are started, which takes half a second
LOOK = 2 * SIDE  # pixels a side at which an image is looked at, at least
NUMBER, LENGTH = struct.Struct("<I"), struct.Struct("<Q")


def look(data: bytes, max_pixels: int, max_side: int) -> Looked | str:
    """Decode and describe one image; return why it cannot be used, where it cannot."""
    try:
        found = examine(data, max_pixels, max_side, LOOK)
        return Looked(found.width, found.height, found.mode, found.suffix, found.scaled, signature(found.small))
    except BrokenImageError as error:
        return one_line(error, 120)
    except MemoryError:
        return "more than the memory holds"


class Decoders:
    """``number`` processes, shared by any number of threads; a context, at the end of which they are gone.

    ``lock`` is an empty file, by which all that share it decode images of many pixels one at a time.
    """

    def __init__(self, number: int, max_pixels: int, max_side: int, lock: Path) -> None:
        self.limits = (max_pixels, max_side)
        self.idle: queue.SimpleQueue[subprocess.Popen[bytes] | None] = queue.SimpleQueue()
        self.running: set[subprocess.Popen[bytes]] = set()
        self.seen = 0
        self.closed = False
        self.lock = threading.Lock()
        self.alone = threading.Lock()
        self.large = lock
        for _ in range(number):
            self.idle.put(None)

    def __enter__(self) -> "Decoders":
        return self

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.closed = True
            running = list(self.running)
        for process in running:
            process.kill()
        for process in running:
            process.communicate()

    def look(self, images: list[bytes]) -> list[Looked | str]:
        """Look at ``images``; safe to be called from several threads."""
        self.seen += len(images)  # where threads count over each other, processes start a little later
        if self.seen <= FEW:
            return [look(data, *self.limits) for data in images]
        found = self._ask(images)
        if found is not None:
            return found
        again: list[Looked | str] = []
        # Which one ended the process is not known, nor whether another took its memory: each once more, alone.
        with self.alone:
            for data in images:
                one = self._ask([data])
                again += one or ["ends the program that decodes it (a defect of the decoder, or too little memory)"]
        return again

    def _ask(self, images: list[bytes]) -> list[Looked | str] | None:
        """Return what a process answers; None: it died over them, or was killed."""
        process = self.idle.get()
        try:
            if process is None:
                try:
                    process = self._start()
                except OSError:  # the machine has no more processes, or no memory for them
                    return [look(data, *self.limits) for data in images]
            return ask(process, images)
        except (OSError, EOFError, ValueError):
            if self.closed:
                raise
            if process is not None:
                process.kill()
                process.communicate()
                with self.lock:
                    self.running.discard(process)
            process = None
            return None
        finally:
            self.idle.put(process)

    def _start(self) -> "subprocess.Popen[bytes]":
        with self.lock:
            if self.closed:
                raise EOFError("closed")
            command = [sys.executable, "-m", __name__, *map(str, self.limits), str(self.large)]
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
            )
            self.running.add(process)
            return process


# ---- what passes between them ----------------------------------------------------------------------------------------------------
# Asked: the number of images, and each one's length and bytes. Answered: the length of a JSON list and the list, one entry an image, then the
# bytes that JSON cannot hold, in the same order.


def ask(process: "subprocess.Popen[bytes]", images: list[bytes]) -> list[Looked | str]:
    assert process.stdin and process.stdout
    process.stdin.write(NUMBER.pack(len(images)))
    for data in images:
        process.stdin.write(LENGTH.pack(len(data)))
        process.stdin.write(data)
    process.stdin.flush()
    answers = json.loads(exactly(process.stdout, NUMBER.unpack(exactly(process.stdout, NUMBER.size))[0]))
    return [one if isinstance(one, str) else looked_of(one, process.stdout) for one in answers]


def looked_of(answer: list[Any], stream: IO[bytes]) -> Looked:
    width, height, mode, suffix, length, brightness, contrast, saturation = answer
    thumb, colour = exactly(stream, SIDE * SIDE), exactly(stream, 3)
    scaled = exactly(stream, length) if length else None
    return Looked(width, height, mode, suffix, scaled, Signature(thumb, colour, brightness, contrast, saturation))


def exactly(stream: IO[bytes], length: int) -> bytes:
    data = stream.read(length)
    if len(data) < length:
        raise EOFError("the process ended")
    return data


class OneAtATime:
    """A lock that processes share: images of many pixels are decoded one at a time."""

    def __init__(self, path: str) -> None:
        self.file = open(path)  # noqa: PTH123, SIM115  open as long as the process

    def __enter__(self) -> None:
        if fcntl:
            with contextlib.suppress(OSError):  # a file system without locks: then they are decoded side by side
                fcntl.flock(self.file, fcntl.LOCK_EX)

    def __exit__(self, *error: object) -> None:
        if fcntl:
            with contextlib.suppress(OSError):
                fcntl.flock(self.file, fcntl.LOCK_UN)


def serve(asked: IO[bytes], answered: IO[bytes], max_pixels: int, max_side: int) -> None:
    """Answer until nothing is asked any more."""
    while head := asked.read(NUMBER.size):
        images = [exactly(asked, LENGTH.unpack(exactly(asked, LENGTH.size))[0]) for _ in range(NUMBER.unpack(head)[0])]
        answers: list[Any] = []
        blobs: list[bytes] = []
        for found in (look(data, max_pixels, max_side) for data in images):
            if isinstance(found, str):
                answers.append(found)
                continue
            looks, scaled = found.signature, found.scaled or b""
            numbers = (looks.brightness, looks.contrast, looks.saturation)
            answers.append([found.width, found.height, found.mode, found.suffix, len(scaled), *numbers])
            blobs += [looks.thumb, looks.colour, scaled]
        text = json.dumps(answers).encode()
        answered.write(NUMBER.pack(len(text)) + text + b"".join(blobs))
        answered.flush()


if __name__ == "__main__":
    how_images.LARGE = OneAtATime(sys.argv[3])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that asks, who then ends this one
    warnings.simplefilter("ignore")
    with contextlib.suppress(BrokenPipeError, EOFError):
        serve(sys.stdin.buffer, sys.stdout.buffer, int(sys.argv[1]), int(sys.argv[2]))
    os._exit(0)
