"""Data sources: where labelled examples come from. A file each; ``open_source`` finds the right one for a URI.

A source is an object with the seven members of ``DataSource``, and a function that takes a URI, and what the user says of how it is to be read,
and returns the source, or None where the URI is not of its kind. Adding one is a file with these two, and a line in ``OPENERS``.
"""

import importlib
from collections.abc import Callable

from graftwork.errors import UserError, one_line
from graftwork.sources.record import AS_IT_IS, NOUNS, DataSource, Reading

# In the order in which they are asked; imported one after the other until one answers, since some need large libraries.
OPENERS = (
    "graftwork.sources.manifest:open_manifest",  # .csv, .tsv, .parquet, .jsonl, of images or texts, at s3:// as well
    "graftwork.sources.archive:open_archive",  # .tar, .tar.gz, .zip, ..., at s3:// as well
    "graftwork.sources.s3:open_s3",  # s3://bucket/prefix
    "graftwork.sources.arrays:open_named",  # fashion-mnist, digits
    "graftwork.sources.text_sets:open_text_set",  # chatterbot-topics
    "graftwork.sources.torchvision_sets:open_torchvision",  # flowers102, eurosat, ...
    "graftwork.sources.folder:open_folder",
)


def open_source(uri: str, reading: Reading = AS_IT_IS) -> DataSource:
    """Find the source for ``uri`` and look at its outside.

    Raises:
        UserError: there is nothing at ``uri``, it is not a labelled set of at least two classes, or not what ``reading`` says.
    """
    if reading.modality not in ("auto", *NOUNS):
        raise UserError(f"setting modality = {one_line(reading.modality)!r}: give auto, image or text")
    for opener in OPENERS:
        module, _, function = opener.partition(":")
        open_it: Callable[[str, Reading], DataSource | None] = getattr(importlib.import_module(module), function)
        source = open_it(uri, reading)
        if source is not None:
            return checked(uri, source, reading)
    raise UserError(
        f"data '{one_line(uri)}': is not of a kind that can be read; give a folder, a .csv or .parquet manifest, an archive, "
        "s3://bucket/prefix or a named dataset"
    )


def checked(uri: str, source: DataSource, reading: Reading) -> DataSource:
    """Return ``source``, where it is what the user takes it for: a setting that nothing heeds is a mistake."""
    if reading.modality not in ("auto", source.modality):
        raise UserError(
            f"setting modality = {reading.modality}: data {one_line(uri)} holds {NOUNS[source.modality]}; give auto, or other data"
        )
    if reading.text_column and source.modality != "text" and hasattr(source, "own_columns"):
        raise UserError(
            f"setting text_column = {one_line(reading.text_column)!r}: data {one_line(uri)} is read as {NOUNS[source.modality]}; "
            "set modality to text"
        )
    for name in ("text_column", "label_column"):
        if getattr(reading, name) and not hasattr(source, "own_columns"):
            raise UserError(
                f"setting {name} = {one_line(getattr(reading, name))!r}: data {one_line(uri)} has no columns; "
                "only a table has (.csv, .tsv, .parquet, .jsonl)"
            )
    return source
