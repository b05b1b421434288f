"""Checkpoints: a run that is killed goes on, and ends as if nothing had happened."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from graftwork import checkpoint
from graftwork.finetune import fine_tune
from graftwork.settings import FineTuneSettings

# A head of zeros, and the loss as the metric: every epoch is better than the start, so what is compared below was trained.
TRAINED = {
    "lp_ft": False, "metric": "loss", "strategy": "full", "epochs": 2, "batch_size": 16, "learning_rate": 3e-3, "layer_decay": 1.0,
    "flip": False, "patience": 99, "plan_seconds": 0, "checkpoint_seconds": 0.001,
}  # fmt: skip
STEPS = 5  # an epoch


class Killed(Exception):
    """Stands for SIGKILL where a second process would cost seconds."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRAFTWORK_CHECKPOINTS", str(tmp_path / "checkpoints"))
    return tmp_path / "checkpoints"


def settings(**given) -> FineTuneSettings:
    return FineTuneSettings(**(TRAINED | given))


def tune(few, baseline: Path, chosen: FineTuneSettings, folder: Path, step: int = -1, epoch: int = -1):
    """Fine-tune; stop at ``step``, or when ``epoch`` is reported. Return (model.json or None, what was said)."""
    said: list[str] = []

    def progress(done: int, total: int) -> None:
        if done == step:
            raise Killed

    def on_epoch(number: int, metrics: dict[str, float]) -> None:
        if number == epoch:
            raise Killed

    try:
        return fine_tune(few, baseline, chosen, folder, progress, said.append, on_epoch), said
    except Killed:
        return None, said


CASES = {
    "adamw with an average": {},
    "sgd on a plateau": {"optimizer": "sgd", "schedule": "plateau", "ema_decay": 0, "epochs": 4, "learning_rate": 0.05},
    "schedule-free": {"optimizer": "schedule-free"},
    "mixup and cutmix": {"mixup": 0.4, "cutmix": 0.5},
    "soup and wise-ft": {"soup": 3, "wise_ft": True, "ema_decay": 0, "epochs": 3},
    "gradual unfreezing": {"strategy": "gradual", "epochs": 3},
    "balanced sampling": {"balance": "sampling", "clip_norm": 0},
    "weighted classes, in parts": {"balance": "weights", "micro_batch": 6},
    "contiguous, one thread": {"memory_format": "contiguous", "threads": 1},
    "trained statistics": {"batchnorm": "trained", "ema_decay": 0},
    "from scratch": {"strategy": "scratch"},
    "a range test": {"rate_test": True, "learning_rate": 0},
    "streamed": {"memory_share": 0},
}


@pytest.mark.parametrize("case", CASES)
def test_stopped_twice_it_ends_with_the_same_weights(
    case: str, few, baseline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours on a spot node would be lost, or the run end with other weights than it would have had: not to be repeated."""
    chosen = settings(**CASES[case])
    undisturbed, _ = tune(few, baseline, chosen, tmp_path / "undisturbed")
    assert undisturbed["selection"]["epoch"] > 0, "what is compared was trained"

    monkeypatch.setenv("GRAFTWORK_CHECKPOINTS", str(tmp_path / "checkpoints"))
    assert tune(few, baseline, chosen, tmp_path / "killed", step=STEPS - 2)[0] is None
    stopped, said = tune(few, baseline, chosen, tmp_path / "killed", step=STEPS + 3)
    assert stopped is None and not (tmp_path / "killed").exists()
    assert any(f"goes on from a checkpoint: step {STEPS - 3} of" in line for line in said)
    resumed, said = tune(few, baseline, chosen, tmp_path / "killed")
    assert any(f"goes on from a checkpoint: step {STEPS + 2} of" in line for line in said)
    assert resumed["sha256"] == undisturbed["sha256"]
    assert resumed["selection"] == undisturbed["selection"] and resumed["averages"] == undisturbed["averages"]
    clock = {"images_per_second"}
    for a, b in zip(resumed["history"], undisturbed["history"], strict=True):
        assert {k: v for k, v in a.items() if k not in clock} == {k: v for k, v in b.items() if k not in clock}
    assert not list((tmp_path / "checkpoints").iterdir()), "what is done needs no checkpoint"


def test_stopped_between_the_last_step_and_validation(few, baseline: Path, place: Path, tmp_path: Path) -> None:
    """An epoch of which no example is left would be trained on a batch of none: an error, or weights that are no numbers."""
    assert tune(few, baseline, settings(), tmp_path / "m", epoch=1)[0] is None
    resumed, said = tune(few, baseline, settings(), tmp_path / "m")
    assert any(f"step {STEPS} of" in line for line in said)
    assert resumed["sha256"] == tune(few, baseline, settings(), tmp_path / "again")[0]["sha256"]
    streamed = settings(memory_share=0)
    assert tune(few, baseline, streamed, tmp_path / "s", epoch=1)[0] is None
    assert tune(few, baseline, streamed, tmp_path / "s")[0]["sha256"] == resumed["sha256"]


def test_stopped_in_the_second_epoch_with_checkpoints_of_epochs_alone(
    few, baseline: Path, place: Path, tmp_path: Path
) -> None:
    """With large networks, a checkpoint is written less often than an epoch ends."""
    chosen = settings(checkpoint_seconds=1000)
    assert tune(few, baseline, chosen, tmp_path / "m", step=STEPS + 2)[0] is None
    reported: list[int] = []
    resumed = fine_tune(few, baseline, chosen, tmp_path / "m", on_epoch=lambda epoch, metrics: reported.append(epoch))
    assert reported == [0, 1, 2], "MLflow's curve has no gap"
    assert resumed["sha256"] == tune(few, baseline, chosen, tmp_path / "again")[0]["sha256"]


def test_a_damaged_checkpoint_costs_one_step(few, baseline: Path, place: Path, tmp_path: Path) -> None:
    """A disk that lost the last write would cost the whole run, or train on from noise."""
    assert tune(few, baseline, settings(), tmp_path / "m", step=4)[0] is None
    last = sorted(place.glob("fine-tune-*/*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-100])
    resumed, said = tune(few, baseline, settings(), tmp_path / "m")
    assert any(last.name in line and "damaged" in line for line in said) and any("step 2 of" in line for line in said)
    assert resumed["sha256"] == tune(few, baseline, settings(), tmp_path / "again")[0]["sha256"]


def test_all_checkpoints_damaged_is_a_new_start(few, baseline: Path, place: Path, tmp_path: Path) -> None:
    """With a range test before it, the run would start anew at another rate than it was given the first time."""
    chosen = settings(rate_test=True, learning_rate=0)
    assert tune(few, baseline, chosen, tmp_path / "m", step=3)[0] is None
    for path in place.glob("fine-tune-*/*.safetensors"):
        path.write_bytes(b"")
    resumed, said = tune(few, baseline, chosen, tmp_path / "m")
    assert not any("goes on" in line for line in said)
    assert resumed["sha256"] == tune(few, baseline, chosen, tmp_path / "again")[0]["sha256"]


def test_other_settings_do_not_go_on(
    few, baseline: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run at another rate, or of other code, would start in the middle of somebody else's training."""
    assert tune(few, baseline, settings(), tmp_path / "m", step=3)[0] is None
    for other in (settings(learning_rate=1e-3), settings(seed=1)):
        assert not any("goes on" in line for line in tune(few, baseline, other, tmp_path / "o", step=1)[1])
    monkeypatch.setenv("GRAFTWORK_BUILD", "another")
    assert not any("goes on" in line for line in tune(few, baseline, settings(), tmp_path / "o", step=1)[1])


def test_no_checkpoints_are_written_unasked(few, baseline: Path, place: Path, tmp_path: Path) -> None:
    """checkpoint_seconds=0 is for disks that are slow or small."""
    tune(few, baseline, settings(checkpoint_seconds=0), tmp_path / "m", step=STEPS + 2)
    assert not list(place.rglob("*.safetensors"))


SCRIPT = """
import sys, time
from pathlib import Path
import pyarrow as pa
from graftwork.dataset import open_dataset
from graftwork.finetune import fine_tune
from graftwork.settings import FineTuneSettings
data = open_dataset(sys.argv[1])
train, val = data.split("train"), data.split("val")
few = data._replace(manifest=pa.concat_tables([train.take(list(range(0, 240, 3))), val.take(list(range(0, 60, 3)))]))
def progress(done, total):
    if done == 7:
        print("waiting", flush=True)
        time.sleep(60)
fine_tune(few, Path(sys.argv[2]), FineTuneSettings.model_validate_json(sys.argv[3]), Path(sys.argv[4]), progress)
"""


def test_killed_by_the_system_it_goes_on(few, baseline: Path, place: Path, tmp_path: Path) -> None:
    """What works with an exception may fail with a power cut: locks that stay, files that were never flushed."""
    arguments = [str(few.folder), str(baseline), settings().model_dump_json(), str(tmp_path / "m")]
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed, said = tune(few, baseline, settings(), tmp_path / "m")
    assert any("goes on from a checkpoint: step 6 of" in line for line in said)
    assert resumed["sha256"] == tune(few, baseline, settings(), tmp_path / "again")[0]["sha256"]


# ---- the files -----------------------------------------------------------------------------------------------------------------

TENSORS = {
    "a/w": torch.arange(24.0).view(2, 3, 2, 2).to(memory_format=torch.channels_last),
    "b": torch.tensor(3),
    "state": torch.arange(8, dtype=torch.uint8),
    "half": torch.ones(3, dtype=torch.bfloat16),
}


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    """A state that comes back otherwise makes another run of it."""
    facts = {"at": {"step": 3}, "rate": 0.1 + 0.2, "text": "é", "none": None, "tiny": 5e-324}
    checkpoint.save(tmp_path, 3, TENSORS, facts)
    tensors, found = checkpoint.load(tmp_path, print)
    assert found == facts and set(tensors) == set(TENSORS)
    assert all(torch.equal(tensors[k], v) and tensors[k].dtype == v.dtype for k, v in TENSORS.items())


@pytest.mark.parametrize("damage", ["a byte", "cut off", "empty"])
def test_damage_is_noticed_and_said(damage: str, tmp_path: Path) -> None:
    """A checkpoint that was half written, or rotted, would be trained on."""
    checkpoint.save(tmp_path, 1, TENSORS, {"n": 1})
    last = checkpoint.save(tmp_path, 2, TENSORS, {"n": 2})
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes({"a byte": bytes(content), "cut off": bytes(content[:-1]), "empty": b""}[damage])
    said: list[str] = []
    assert checkpoint.load(tmp_path, said.append)[1] == {"n": 1}
    assert len(said) == 1 and last.name in said[0] and "damaged" in said[0]
    next(tmp_path.glob("*.safetensors")).write_bytes(b"x")
    assert checkpoint.load(tmp_path, said.append) is None and len(said) == 2


def test_two_are_kept_and_half_a_file_is_none(tmp_path: Path) -> None:
    """A long run would fill her disk; a file that was being written when the power went would be taken for a checkpoint."""
    for step in (9, 10, 99, 100):
        checkpoint.save(tmp_path, step, TENSORS, {"n": step})
    assert [p.name[:9] for p in sorted(tmp_path.iterdir())] == ["000000099", "000000100"]
    (tmp_path / "000000101-abc.partial").write_bytes(b"half")
    assert checkpoint.load(tmp_path, print)[1] == {"n": 100}
    checkpoint.save(tmp_path, 100, TENSORS, {"n": "again"})
    assert [p.name[:9] for p in sorted(tmp_path.glob("*.safetensors"))] == ["000000099", "000000100"]


def test_of_two_at_one_step_the_later_counts(tmp_path: Path) -> None:
    """At the end of an epoch two are written at one step: by their digests, the one before validation might be taken."""
    for n in range(12):
        checkpoint.save(tmp_path, 5, TENSORS, {"n": n})
        assert checkpoint.load(tmp_path, print)[1] == {"n": n}


HOLDER = """
import sys, time
from graftwork.checkpoint import job_folder
with job_folder("fine-tune", "x") as folder:
    print(folder, flush=True)
    time.sleep(60)
"""


def test_two_processes_do_not_share_a_job(place: Path) -> None:
    """Two runs of the same command would take each other's checkpoints away."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        theirs = process.stdout.readline().strip()
        with checkpoint.job_folder("fine-tune", "x") as folder:
            assert folder is None
        with checkpoint.job_folder("fine-tune", "y") as folder:
            assert folder is not None and str(folder) != theirs
    finally:
        process.kill()
        process.wait()
    with checkpoint.job_folder("fine-tune", "x") as folder:
        assert str(folder) == theirs, "who was killed holds no lock"


def test_without_a_folder_there_are_no_checkpoints(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A step on a cluster without a volume, or with one that is read-only, would not start."""
    monkeypatch.delenv("GRAFTWORK_CHECKPOINTS", raising=False)
    with checkpoint.job_folder("fine-tune", "x") as folder:
        assert folder is None
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRAFTWORK_CHECKPOINTS", str(tmp_path / "file"))
    with checkpoint.job_folder("fine-tune", "x") as folder:
        assert folder is None


def test_what_never_went_on_is_forgotten(place: Path) -> None:
    """Her disk would fill with the checkpoints of runs that she gave up."""
    old, new = place / f"fine-tune-{1:024x}", place / f"features-{2:024x}"  # named as jobs are
    for folder in (old, new):
        folder.mkdir(parents=True)
        checkpoint.save(folder, 1, TENSORS, {})
    long_ago = time.time() - 15 * 24 * 3600
    os.utime(old, (long_ago, long_ago))
    with checkpoint.job_folder("fine-tune", "x"):
        pass
    assert not old.exists() and new.exists()


def test_only_its_own_old_folders_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pointed at a folder that holds other things too, it would delete whatever she had not touched for two weeks."""
    monkeypatch.setenv("GRAFTWORK_CHECKPOINTS", str(tmp_path))
    hers, old = tmp_path / "fine-tune-photos", tmp_path / f"fine-tune-{'0' * 24}"
    for folder in (hers, old):
        folder.mkdir()
        (folder / "file").write_text("x", encoding="utf-8")
        os.utime(folder, (0, 0))
    with checkpoint.job_folder("fine-tune", "x") as folder:
        assert folder is not None and folder.is_dir()
    assert (hers / "file").exists() and not old.exists()


def test_a_folder_that_cannot_be_used_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """She would learn that nothing was kept only after the crash that it was for."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("GRAFTWORK_CHECKPOINTS", str(tmp_path / "file"))
    said: list[str] = []
    with checkpoint.job_folder("fine-tune", "x", note=said.append) as folder:
        assert folder is None
    assert len(said) == 1 and "no checkpoints are kept" in said[0] and str(tmp_path / "file") in said[0]
