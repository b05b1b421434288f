"""The learning curve's command."""

from pathlib import Path

import pytest

from graftwork.errors import UserError
from graftwork.pipelines.learning_curve import only_one


def test_the_same_curve_is_measured_by_one_process_at_a_time(tmp_path: Path) -> None:
    """A curve started twice by mistake would end hours later, with an error about files that the other had moved."""
    with (
        only_one(tmp_path, tmp_path / "runs"),
        pytest.raises(UserError, match=r"being measured there; wait for it, or give another --output"),
        only_one(tmp_path, Path("runs")),
    ):
        pass
    with only_one(tmp_path, tmp_path / "runs"):
        pass
