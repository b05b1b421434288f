"""What is handed from step to step by name is checked by its digest."""

import json
import shutil
from pathlib import Path

import pytest

from graftwork import steps
from graftwork.model import read_info


def failed(capsys: pytest.CaptureFixture[str], call) -> str:
    with pytest.raises(SystemExit) as raised:
        call()
    assert raised.value.code == 1
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def journals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTWORK_JOURNALS", str(tmp_path / "journals"))


def test_a_baseline_of_another_run_is_refused(dataset, baseline: Path, tmp_path: Path, capsys) -> None:
    """A cache that knows artifacts by name would hand last month's baseline to this month's training."""
    arguments = [str(dataset.folder), dataset.digest, str(baseline), str(tmp_path / "model"), str(tmp_path / "metrics")]
    said = failed(capsys, lambda: steps.fine_tune(*arguments, "0" * 64, epochs=1, plan_seconds=0))
    assert "the baseline: has the digest" in said and said.count("error:") == 1
    assert not (tmp_path / "model").exists()
    assert steps.model_digest(str(baseline)) == read_info(baseline)["sha256"]


def test_embeddings_of_another_run_are_refused(baseline: Path, tmp_path: Path, capsys) -> None:
    """The probe would be fitted on features of other images."""
    embeddings = baseline.parent / "embeddings"
    digest = steps.digest_of_embeddings(str(embeddings))
    found = steps.train_baseline(str(embeddings), str(tmp_path / "model"), str(tmp_path / "metrics"), digest)
    assert found["val_accuracy"] > 0.5
    other = tmp_path / "other"
    shutil.copytree(embeddings, other)
    info = json.loads((other / "embeddings.json").read_text())
    (other / "embeddings.json").write_text(json.dumps(info | {"dataset_digest": "0" * 32}))
    assert steps.digest_of_embeddings(str(other)) != digest
    said = failed(capsys, lambda: steps.train_baseline(str(other), str(tmp_path / "m"), str(tmp_path / "n"), digest))
    assert "the embeddings: has the digest" in said
