"""Processes that decode: the same answers as in this process, and nothing that an image does ends more than its own process."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

import graftwork.decoders
from graftwork.decoders import Decoders, Looked, look


def encoded(seed: int, format: str = "PNG", size: tuple[int, int] = (70, 50)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 5, size[0] // 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(buffer, format)
    return buffer.getvalue()


def lock_in(folder: Path) -> Path:
    (folder / "lock").touch()
    return folder / "lock"


@pytest.fixture
def decoders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Decoders]:
    monkeypatch.setattr(graftwork.decoders, "FEW", 0)
    with Decoders(2, 1_000_000, 60, lock_in(tmp_path)) as running:
        yield running


def test_a_process_answers_as_this_one_does(decoders: Decoders) -> None:
    """A user's large dataset would be packed otherwise than a small one."""
    images = [encoded(0), encoded(1, "JPEG"), encoded(2, "GIF", (300, 200)), b"", b"no image", encoded(3)[:200]]
    images.append(encoded(4, "PNG", (1200, 900)))
    found = decoders.look(images)
    assert found == [look(data, 1_000_000, 60) for data in images] and len(decoders.running) == 1
    assert [type(one) for one in found] == [Looked, Looked, Looked, str, str, str, str]
    assert isinstance(found[2], Looked) and found[2].scaled and found[2].suffix == ".png" and found[0].scaled is None
    assert decoders.look([]) == []


def test_few_images_start_no_process(tmp_path: Path) -> None:
    """A user's hundred images would wait for processes to start."""
    with Decoders(2, 1_000_000, 0, lock_in(tmp_path)) as decoders:
        assert len(decoders.look([encoded(0)] * 3)) == 3 and not decoders.running


def test_threads_share_the_processes(decoders: Decoders) -> None:
    """A user's image would be described by what another thread asked for."""
    images = [encoded(n) for n in range(40)]
    expected = [look(data, 1_000_000, 60) for data in images]
    answers: dict[int, list[Looked | str]] = {}

    def work(n: int) -> None:
        answers[n] = [one for k in range(0, 40, 4) for one in decoders.look(images[n:][k : k + 4])]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(answers[n] == expected[n:] for n in range(8)) and len(decoders.running) == 2


def test_an_image_that_ends_its_process_is_broken_and_no_other(
    decoders: Decoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's one hostile image would end the packing of a million, or take its neighbours with it."""
    start = Decoders._start

    def with_a_defect(self: Decoders) -> "subprocess.Popen[bytes]":
        """Start a process whose decoder is ended by one image, as a defect in C or the kernel ends it."""
        program = (
            "import os, sys, runpy\n"
            "import graftwork.images as images\n"
            "examine = images.examine\n"
            "def hostile(data, *rest):\n"
            "    if data == b'hostile': os.kill(os.getpid(), 9)\n"
            "    return examine(data, *rest)\n"
            "images.examine = hostile\n"
            f"sys.argv = ['x', '{self.limits[0]}', '{self.limits[1]}', '{self.large}']\n"
            "runpy.run_module('graftwork.decoders', run_name='__main__')\n"
        )
        command = [sys.executable, "-c", program]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.running.add(process)
        return process

    monkeypatch.setattr(Decoders, "_start", with_a_defect)
    images = [encoded(0), b"hostile", encoded(1), b"hostile"]
    found = decoders.look(images)
    assert [found[0], found[2]] == [look(images[0], 1_000_000, 60), look(images[2], 1_000_000, 60)]
    assert all("ends the program that decodes it" in str(found[n]) for n in (1, 3))
    monkeypatch.setattr(Decoders, "_start", start)
    assert decoders.look(images[:1]) == found[:1]


def test_a_process_that_is_killed_is_replaced(decoders: Decoders) -> None:
    """A user's machine that is short of memory would end the packing."""
    images = [encoded(n) for n in range(3)]
    before = decoders.look(images)
    for process in list(decoders.running):
        process.kill()
    assert decoders.look(images) == before


def test_no_process_outlives_the_one_that_asked(tmp_path: Path) -> None:
    """A user's killed run would leave processes behind, one a core, for ever."""
    program = (
        "import os, pathlib, sys, time, graftwork.decoders as d\n"
        "d.FEW = 0\n"
        "decoders = d.Decoders(2, 100, 100, pathlib.Path(sys.argv[1]))\n"
        "decoders.look([b''])\n"
        "print(*(p.pid for p in decoders.running), flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(lock_in(tmp_path))], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    children = [int(pid) for pid in process.stdout.readline().split()]
    assert children and all(psutil.pid_exists(pid) for pid in children)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_end_of_the_context_ends_the_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user's later steps would share the machine with idle processes of the first."""
    monkeypatch.setattr(graftwork.decoders, "FEW", 0)
    with Decoders(2, 1_000_000, 0, lock_in(tmp_path)) as decoders:
        decoders.look([encoded(0)])
        children = list(decoders.running)
    assert children and all(child.poll() is not None for child in children)
    with pytest.raises((OSError, EOFError, ValueError)):
        decoders.look([encoded(0)])


def test_where_no_process_can_be_started_this_one_decodes(decoders: Decoders, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's good images would be called broken on a machine that has no more processes to give."""

    def refuse(*arguments: object, **options: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert decoders.look([encoded(0)]) == [look(encoded(0), 1_000_000, 60)]


def test_large_images_wait_for_each_other(decoders: Decoders) -> None:
    """A user's two panoramas at once would need twice the memory that a pod has."""
    fcntl = pytest.importorskip("fcntl", reason="no file locks on this system")
    buffer = io.BytesIO()
    Image.new("L", (4001, 4000)).save(buffer, "PNG")
    decoders.limits = (100_000_000, 0)
    answers: list[list[Looked | str]] = []
    with decoders.large.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        thread = threading.Thread(target=lambda: answers.append(decoders.look([buffer.getvalue()])))
        thread.start()
        thread.join(3)
        assert thread.is_alive() and not answers
        fcntl.flock(other, fcntl.LOCK_UN)
        thread.join(30)
    assert isinstance(answers[0][0], Looked) and answers[0][0].width == 4001
