"""Drift: silent on samples of the same data, loud on others, and read from where the champion is registered."""

import json
from pathlib import Path

import numpy as np
import pytest

from graftwork.dataset import Dataset
from graftwork.drift import FORMAT, champion_profile, compare, histogram, profile, read_profile, stability_index
from graftwork.errors import UserError
from graftwork.image_looks import EDGES


@pytest.mark.parametrize("sizes", [(100, 100), (100, 5000), (2000, 2000), (30, 40)])
def test_two_samples_of_the_same_data_have_not_drifted(sizes: tuple[int, int]) -> None:
    """A user with a few hundred images would be warned of drift every week."""
    shares = np.array([0.3, 0.25, 0.2, 0.1, 0.1, 0.05])
    found = [
        stability_index(*(np.random.default_rng([seed, n]).multinomial(n + seed % 2, shares) for n in sizes))
        for seed in range(300)
    ]
    assert np.mean(np.array(found) > 0.2) < 0.01


def test_a_shift_of_class_shares_is_found() -> None:
    """A user's new data, with a class at twice its share, would pass for the same."""
    before = np.random.default_rng(0).multinomial(2000, [0.1] * 10)
    now = np.random.default_rng(1).multinomial(2000, [0.4] + [0.6 / 9] * 9)
    assert stability_index(now, before) > 0.2 and stability_index(before, now) > 0.2


def test_the_index_is_the_published_one() -> None:
    """A user who checks the figure with a pencil would find another."""
    p, q = np.array([600_000, 400_000]), np.array([500_000, 500_000])
    assert stability_index(p, q) == pytest.approx(0.1 * np.log(1.2) - 0.1 * np.log(0.8), abs=2e-4)
    assert stability_index(p, p) == 0 == stability_index(np.array([5]), np.array([7]))
    assert stability_index(np.array([0, 0]), p) == 0  # nothing to compare


def test_what_lies_beyond_the_edges_is_counted() -> None:
    """A user's images larger than any foreseen would vanish from the comparison."""
    for edges in EDGES.values():
        counts = histogram(np.array([-5.0, edges[0], edges[-1], 1e9]), edges)
        assert sum(counts) == 4 and counts[0] == 2 and counts[-1] == 2


def test_a_profile_is_of_the_dataset_and_survives_json(dataset: Dataset, tmp_path: Path) -> None:
    """A user's profile would be of something else once it has been stored."""
    found = profile(dataset)
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(found))
    assert read_profile(str(path)) == found == read_profile(str(dataset.folder))
    assert found["classes"] == dataset.info["counts"]["train"] and found["digest"] == dataset.digest
    assert all(sum(counts) == len(dataset.manifest) for counts in found["images"].values())
    assert set(compare(found, found).values()) == {0.0}


@pytest.mark.parametrize(
    "content", [None, "{", "[]", json.dumps({"format": FORMAT + "0"}), json.dumps({"format": FORMAT})]
)
def test_a_reference_that_is_none_gets_one_line(content: str | None, tmp_path: Path) -> None:
    """A user who misspells the reference would get a trace, or no judgement and no word."""
    if content is not None:
        (tmp_path / "p.json").write_text(content)
    with pytest.raises(UserError, match=r"reference .*p.json: cannot be read .*or 'none'"):
        read_profile(str(tmp_path / "p.json"))


def test_a_registry_without_a_champion_has_no_profile(tmp_path: Path) -> None:
    """A user's first run would stop because nothing came before it."""
    assert champion_profile("nobody", f"sqlite:///{tmp_path / 'mlflow.db'}") is None


def test_a_registry_that_is_damaged_gets_one_line(tmp_path: Path) -> None:
    """A user's damaged database would be a trace before anything runs."""
    (tmp_path / "mlflow.db").write_bytes(b"no database " * 100)
    with pytest.raises(UserError, match="model registry: cannot be read"):
        champion_profile("nobody", f"sqlite:///{tmp_path / 'mlflow.db'}")
