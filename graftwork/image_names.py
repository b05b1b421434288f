"""Names of image backbones, told before anything runs. Imports neither torch nor, as a rule, timm."""

import difflib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from graftwork.errors import UserError, one_line
from graftwork.files import write_json
from graftwork.settings import DEFAULT_BACKBONE

DEFAULT = DEFAULT_BACKBONE


def check_backbone(parameters: dict[str, Any], cache: Path) -> None:
    """Refuse a name that timm does not know. The names are kept under ``cache``, since importing timm takes seconds.

    Raises:
        UserError: there is no such network, or ``cache`` cannot be written.
    """
    name = str(parameters["backbone"])
    if name == DEFAULT:
        return
    kept = cache / f"timm-{version('timm')}.json"
    try:
        names = json.loads(kept.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        import timm

        names = timm.list_models() + timm.list_pretrained()
        try:
            write_json(kept, names)
        except OSError as error:
            raise UserError(
                f"output {one_line(cache.parent)}: cannot be written ({error.strerror}); give another with --output"
            ) from None
    if name not in names and name.split(".")[0] not in names:
        near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
        raise UserError(
            f"backbone '{one_line(name)}': timm has no such network; "
            + (f"did you mean {', '.join(near)}?" if near else "see timm.list_models()")
        )
