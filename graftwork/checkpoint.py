"""Checkpoints: one file with all that the next step needs, named by the digest of its contents, so that a damaged one is recognised.

They lie in a folder of their own for every job, by what the job is made of: the same command finds them again after a crash.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from graftwork.errors import one_line
from graftwork.tracking import CHECKPOINTS

JOB = re.compile(r"(fine-tune|features)-[0-9a-f]{24}")  # the folders that are made here
KEPT = 2  # of a job: the last, and the one before it, should the last be damaged
FORGOTTEN_AFTER = 14 * 24 * 3600  # seconds after which the checkpoints of a job that never went on are removed


@contextmanager
def job_folder(kind: str, *made_of: Any, note: Callable[[str], None] = lambda message: None) -> Iterator[Path | None]:
    """Yield the folder of the job that is made of ``made_of``, locked for this process; None where there is none, or another has it.

    The build of the code, which the local runner names, is part of it: other code does not go on where this one stopped.
    """
    root = os.environ.get(CHECKPOINTS)
    if not root:
        yield None
        return
    identity = json.dumps([kind, os.environ.get("GRAFTWORK_BUILD", ""), *made_of], sort_keys=True, default=str)
    folder = Path(root) / f"{kind}-{hashlib.sha256(identity.encode()).hexdigest()[:24]}"
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            forget_old(Path(root), folder)
            lock = stack.enter_context((folder / "lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a process that dies leaves no lock
        except OSError as error:
            reason = "another run is at this very job" if isinstance(error, BlockingIOError) else one_line(error)
            note(f"no checkpoints are kept: {reason}")
            yield None
            return
        yield folder


def remove(folder: Path | None) -> None:
    """Remove the checkpoints of a job that is done."""
    if folder:
        shutil.rmtree(folder, ignore_errors=True)


def forget_old(root: Path, current: Path) -> None:
    for folder in root.iterdir():
        if not JOB.fullmatch(folder.name):  # the user may keep other things here
            continue
        with contextlib.suppress(OSError):
            if folder != current and time.time() - folder.stat().st_mtime > FORGOTTEN_AFTER:
                shutil.rmtree(folder, ignore_errors=True)


def save(folder: Path, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Path:
    """Write ``tensors`` and ``facts`` (plain JSON) as the checkpoint of ``step``; all but the last ones are removed."""
    from safetensors.torch import save as to_bytes

    content = to_bytes({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, {"facts": json.dumps(facts)})
    path = folder / f"{step:09d}-{hashlib.sha256(content).hexdigest()[:32]}.safetensors"
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    # At the end of an epoch two are written at one step: the later one takes the place of the other.
    others = sorted(p for p in folder.glob("*.safetensors") if p != path)
    same = [p for p in others if p.name.startswith(f"{step:09d}-")]
    for old in same + [p for p in others if p not in same][: 1 - KEPT]:
        old.unlink(missing_ok=True)
    return path


def load(folder: Path, note: Callable[[str], None]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return the tensors and facts of the last checkpoint that is whole; None where there is none."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors"), reverse=True):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:32]
        if digest != path.stem.split("-")[-1]:
            note(f"checkpoint {path.name}: is damaged, the one before it is used")
            path.unlink(missing_ok=True)
            continue
        with safe_open(path, "pt") as opened:
            facts = json.loads(opened.metadata()["facts"])
            return {name: opened.get_tensor(name) for name in opened.keys()}, facts  # noqa: SIM118  no dictionary
    return None
