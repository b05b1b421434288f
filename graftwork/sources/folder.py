"""A folder: ``CLASS/*.jpg``, or ``train|val|test/CLASS/*.jpg``; of texts, ``*.txt``."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from graftwork.errors import UserError, one_line
from graftwork.parallel import WORKERS
from graftwork.sources.record import (
    AS_IT_IS,
    SPLIT_NAMES,
    DataSource,
    File,
    Layout,
    Reading,
    Record,
    check_layout,
    local_path,
    modality_of,
    printable,
    settle,
)


def open_folder(uri: str, reading: Reading = AS_IT_IS) -> DataSource | None:
    """Return the folder at ``uri``; the last source asked, so that it says what else could have been given."""
    if "://" in uri and not uri.startswith("file://"):
        return None
    return FolderSource(local_path(uri), reading.modality)


class FolderSource:
    """Sub-folders of a class belong to it; hidden files are passed over; links are followed."""

    readers = WORKERS

    def __init__(self, root: Path, modality: str = "auto") -> None:
        from graftwork.sources import arrays, text_sets

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
                f"data {shown}: no such folder, and no dataset of that name (named: {', '.join((*arrays.NAMED, *text_sets.NAMED))}); check the path"
            )
        if kind == "file":
            raise UserError(
                f"data {shown}: is a file that is neither a manifest or table (.csv, .parquet, .jsonl) nor an archive (.tar, .zip); "
                "give the folder that holds one folder of images or texts a class"
            )
        self.root = root.resolve()
        self.name = printable(self.root.name) or "data"
        found = list(self._walk())
        self.modality = settle(lambda: found, modality)
        if any(c.lower() in SPLIT_NAMES for c in children):  # beside train and test, a folder of notes is no class
            holding = {path.partition("/")[0] for path in found if modality_of(path) == self.modality}
            children = [c for c in children if c.lower() in SPLIT_NAMES or c in holding]
        self.layout = Layout(children, self.modality)
        self._files: list[tuple[str, str, str]] = []  # path below the root, label, split
        for path in found:
            if member := self.layout.place(tuple(path.split("/"))):
                self._files.append((path, member.label, member.split))
        check_layout(shown, self.layout, {label for _, label, _ in self._files}, len(self._files))

    def _walk(self) -> Iterator[str]:
        """Yield the path below the root of every file."""

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
                yield "/".join((*parts, file))

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
