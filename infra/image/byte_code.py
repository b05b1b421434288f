"""byte_code.py LAYER... OUT: writes the byte code of what the steps load from the layers: that of the first into OUT/torch, the rest's into OUT/others.
Run by the Dockerfile, with the image's Python.

Python may not write byte code in the image, and compiling takes a step seconds. That of all modules would be 0.3 GB, so it is made of those that the
steps load, found by loading them. It is marked as unchecked: in an image, no source is newer.
"""

import contextlib
import importlib
import os
import pkgutil
import py_compile
import sys
from importlib.util import cache_from_source
from pathlib import Path

SITE = f"opt/graftwork/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
*layers, out = (Path(argument) for argument in sys.argv[1:])
sys.path += [str(layer / SITE) for layer in layers]
os.environ["_KFP_RUNTIME"] = "true"  # as in a step, where kfp leaves out its client

import graftwork  # noqa: E402
from graftwork.modality import MODALITIES, imports  # noqa: E402
from graftwork.pipelines.warm import MODULES  # noqa: E402

library = (module.name for module in pkgutil.walk_packages(graftwork.__path__, "graftwork."))
for name in (
    *MODULES,
    *(name for name in library if not name.startswith(("graftwork.pipelines", "graftwork.components"))),
):
    importlib.import_module(name)
for name in (name for modality in MODALITIES for name in imports(modality)):
    with contextlib.suppress(ImportError):  # of an optional extra, which this image may lack
        importlib.import_module(name)
loaded = {Path(file) for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None))}
for file in loaded:
    layer = next((layer for layer in layers if file.suffix == ".py" and file.is_relative_to(layer)), None)
    if layer:
        final = Path("/", file.relative_to(layer))
        part = "torch" if layer == layers[0] else "others"
        target = out / part / Path(cache_from_source(str(final))).relative_to("/")
        unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH
        py_compile.compile(str(file), str(target), str(final), doraise=True, invalidation_mode=unchecked)
