"""One KFP component a step: its inputs, its outputs and one call into the library."""

import os

from graftwork import __version__

# Read when a pipeline is compiled. The image holds this package, with every dependency: nothing is installed at run time.
IMAGE = os.environ.get("GRAFTWORK_IMAGE") or f"ghcr.io/graftwork/graftwork-python:{__version__}"
