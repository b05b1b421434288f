"""Data sources: where labelled examples come from. A file each; ``open_source`` finds the right one for a URI.

A source is an object with the six members of ``DataSource``, and a function that takes a URI and returns the source, or None where the URI is
not of its kind. Adding one is a file with these two, and a line in ``OPENERS``.
"""

import importlib
from collections.abc import Callable

from graftwork.errors import UserError, one_line
from graftwork.sources.record import DataSource

# In the order in which they are asked; imported one after the other until one answers, since some need large libraries.
OPENERS = (
    "graftwork.sources.manifest:open_manifest",  # .csv, .tsv, .parquet, at s3:// as well
    "graftwork.sources.archive:open_archive",  # .tar, .tar.gz, .zip, ..., at s3:// as well
    "graftwork.sources.s3:open_s3",  # s3://bucket/prefix
    "graftwork.sources.arrays:open_named",  # fashion-mnist, digits
    "graftwork.sources.torchvision_sets:open_torchvision",  # flowers102, eurosat, ...
    "graftwork.sources.folder:open_folder",
)


def open_source(uri: str) -> DataSource:
    """Find the source for ``uri`` and look at its outside.

    Raises:
        UserError: there is nothing at ``uri``, or it is not a labelled set of at least two classes.
    """
    for opener in OPENERS:
        module, _, function = opener.partition(":")
        open_it: Callable[[str], DataSource | None] = getattr(importlib.import_module(module), function)
        source = open_it(uri)
        if source is not None:
            return source
    raise UserError(
        f"data '{one_line(uri)}': is not of a kind that can be read; give a folder, a .csv or .parquet manifest, an archive, "
        "s3://bucket/prefix or a named dataset"
    )
