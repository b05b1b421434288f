"""A folder: ``CLASS/*.jpg``, or ``train|val|test/CLASS/*.jpg``."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from graftwork.errors import UserError, one_line
from graftwork.parallel import WORKERS
from graftwork.sources.record import (
    IMAGE_SUFFIXES,
    SPLIT_NAMES,
    DataSource,
    File,
    Layout,
    Record,
    check_layout,
    local_path,
    printable,
)


def open_folder(uri: str) -> DataSource | None:
    """Return the folder at ``uri``; the last source asked, so that it says what else could have been given."""
    if "://" in uri and not uri.startswith("file://"):
        return None
    return FolderSource(local_path(uri))


def holds_images(folder: Path) -> bool:
    return any(Path(f).suffix.lower() in IMAGE_SUFFIXES for _, _, files in os.walk(folder) for f in files)


class FolderSource:
    """Sub-folders of a class belong to it; hidden files are passed over; links are followed."""

    readers = WORKERS

    def __init__(self, root: Path) -> None:
        from graftwork.sources.arrays import NAMED

        shown = one_line(root)
        try:
            # What a path cannot be (too long, a NUL byte) raises here as well.
            kind = "missing" if not root.exists() else "folder" if root.is_dir() else "file"
            children = (
                # A link that leads back up is no class and no split.
                sorted(
                    p.name
                    for p in root.iterdir()
                    if p.is_dir()
                    and not p.name.startswith(".")
                    and p.name != "__MACOSX"
                    and p.resolve() not in (root.resolve(), *root.resolve().parents)
                )
                if kind == "folder"
                else []
            )
        except (OSError, ValueError) as error:
            raise UserError(
                f"data {shown}: cannot be read ({getattr(error, 'strerror', None) or error}); give a folder that you may read"
            ) from None
        if kind == "missing":
            raise UserError(
                f"data {shown}: no such folder, and no dataset of that name (named: {', '.join(NAMED)}); check the path"
            )
        if kind == "file":
            raise UserError(
                f"data {shown}: is a file that is neither a manifest (.csv, .parquet) nor an archive (.tar, .zip); "
                "give the folder that holds one folder of images a class"
            )
        self.root = root.resolve()
        self.name = printable(self.root.name) or "data"
        if any(c.lower() in SPLIT_NAMES for c in children):  # beside train and test, a folder of notes is no class
            children = [c for c in children if c.lower() in SPLIT_NAMES or holds_images(self.root / c)]
        self.layout = Layout(children)
        self._files = list(self._walk())
        check_layout(shown, self.layout, {label for _, label, _ in self._files}, len(self._files))

    def _walk(self) -> Iterator[tuple[str, str, str]]:
        """Yield (path below the root, label, split)."""

        def refuse(error: OSError) -> None:
            raise UserError(
                f"data {one_line(error.filename)}: cannot be read ({error.strerror}); give a folder that you may read"
            ) from None

        for folder, subfolders, files in os.walk(self.root, followlinks=True, onerror=refuse):
            here, real = Path(folder), Path(folder).resolve()
            if here != real and real in (p.resolve() for p in here.parents):  # a link to a folder that it is in
                subfolders.clear()
                continue
            subfolders[:] = sorted(s for s in subfolders if not s.startswith(".") and s != "__MACOSX")
            parts = here.relative_to(self.root).parts
            for file in sorted(files):
                member = self.layout.place((*parts, file))
                if member:
                    yield "/".join((*parts, file)), member.label, member.split

    def fingerprint(self) -> str:
        digest = hashlib.sha256(str(self.root).encode("utf-8", "surrogateescape"))
        for path, _, _ in self._files:
            line = f"{path}\0{File(self.root / path).version()}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:32]

    def records(self) -> Iterator[Record]:
        for path, label, split in self._files:
            yield Record(printable(path), label, split, File(self.root / path))

    def __len__(self) -> int:
        return len(self._files)

    def skipped(self) -> dict[str, int]:
        return dict(self.layout.skipped)
