"""The local runner: what it works around, and what it tells."""

import json
import time
from pathlib import Path

from graftwork.pipelines import local
from graftwork.tracking import Journal


def test_paths_that_hold_python3_survive() -> None:
    """kfp's own runner turns ~/python3-course into a path that does not exist."""
    command = ["sh", "-c", "python3 -m kfp.dsl.executor_main", "--executor_input", '{"data": "/home/u/python3-course"}']
    assert local.use_python(command, "/v/bin/python") == [
        "sh",
        "-c",
        "/v/bin/python -m kfp.dsl.executor_main",
        "--executor_input",
        '{"data": "/home/u/python3-course"}',
    ]


def test_build_digest_changes_with_the_code(monkeypatch, tmp_path: Path) -> None:
    """kfp's cache would reuse what an older version of the library computed."""
    package = tmp_path / "graftwork"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "baseline.py").write_text("C = 1\n")
    monkeypatch.setattr(local.graftwork, "__file__", str(package / "__init__.py"))
    before = local.build_digest()
    assert before == local.build_digest()
    (package / "baseline.py").write_text("C = 2\n")
    assert local.build_digest() != before


def test_reason_of_a_failure_is_told(tmp_path: Path) -> None:
    """kfp says that a task failed; the user needs to know why."""
    Journal(tmp_path, "ingest_data").write("end", status="FINISHED")
    journal = Journal(tmp_path, "fine_tune")
    journal.write("start", created=time.time())
    assert "fine_tune failed: its process was killed" in local.why(tmp_path, "x")
    journal.write("error", message="no labels; add some")
    assert (
        local.why(tmp_path, "x") == "step fine_tune failed: no labels; add some; the next run reuses what was finished"
    )


def test_timings_leave_starts_and_imports_out_of_the_work(tmp_path: Path) -> None:
    """If the overhead were counted as work, nobody would notice it growing."""
    lines = [
        {"event": "start", "time": 11.0, "created": 10.0},
        {"event": "working", "time": 14.0},
        {"event": "end", "time": 20.0, "status": "FINISHED"},
    ]
    (tmp_path / "evaluate_model.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert local.step_timings(tmp_path, ["evaluate_model"]) == {
        "evaluate_model": {"seconds": 10.0, "work_seconds": 6.0}
    }


def test_reused_steps_are_journalled_from_their_first_run(tmp_path: Path) -> None:
    """A run whose steps were reused would show nothing in MLflow, and could not be compared."""
    origin = tmp_path / "20260101-000000-aaaa"
    old = Journal(origin / "journals", "train_baseline")
    old.metrics({"val_accuracy": 0.8})
    old.artifact(tmp_path / "x")
    artifact = origin / "artifacts" / "p-1" / "train-baseline" / "model"
    journals = tmp_path / "20260102-000000-bbbb" / "journals"
    journals.mkdir(parents=True)
    local.mark_reused(["train_baseline"], journals, {"baseline": artifact})
    events = [json.loads(line) for line in (journals / "train_baseline.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events] == ["start", "tags", "metrics", "end"]
    assert events[1]["values"] == {"graftwork.reused_from": origin.name}
    assert local.step_timings(journals, ["train_baseline"])["train_baseline"]["reused_from"] == origin.name


def test_process_names_tell_a_live_process_from_a_dead_one() -> None:
    """Process ids are used again: without the start time, a stale run would look alive."""
    import os

    name = local.process_name(os.getpid())
    assert name.split(":")[1] == str(os.getpid()) and name == local.process_name(os.getpid())
