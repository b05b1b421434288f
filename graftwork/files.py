"""Writing so that nothing half-made is ever taken for finished: a temporary name first, then one rename."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STORE = (
    "GRAFTWORK_STORE"  # environment variable: the folder of packs that ingests share; without it, each packs everything
)


@contextmanager
def finished_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``path`` to fill; it takes the name ``path`` only if the block ends without an exception."""
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.is_dir():  # a step that is retried, or a runner that made the folder first
            shutil.rmtree(path)
        partial.replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as JSON to ``path`` in one step. NaN and infinity are refused: they are no JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
