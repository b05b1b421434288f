"""The tracking server of ``mlflow/``, whole: PostgreSQL, SeaweedFS and MLflow with accounts, under real runs that lose each of them.

GRAFTWORK_OUTAGE_ROUNDS says how many runs are disturbed; ``benchmarks/outages.py`` plays twenty and keeps the table.
"""

import base64
import contextlib
import json
import os
import random
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import postgres_server
import psutil
import pytest
import s3_server
import tracking_server
import yaml
from outage import NAME, audit, command, play, run_once
from tracking_server import BUCKET, PYTHON, Server

ROUNDS = int(os.environ.get("GRAFTWORK_OUTAGE_ROUNDS", "3"))
EPOCHS = 4
FOLDER = Path(__file__).parents[2] / "mlflow"
pytestmark = [pytest.mark.e2e, pytest.mark.skipif(bool(tracking_server.missing()), reason=tracking_server.missing())]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    before = dict(os.environ)
    with tracking_server.serve(tmp_path_factory.mktemp("tracking")) as running:
        yield running
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where the commands are given; its runs are what the server must know."""
    return tmp_path_factory.mktemp("runs") / "place"


@pytest.fixture(scope="module")
def first(server: Server, place: Path, weights: Path) -> dict[str, Any]:
    """An undisturbed run: {"seconds", "summary"}."""
    done, seconds = run_once(server, place, command(weights, EPOCHS, 0))
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (place / "runs").glob("*/summary.json")
    return {"seconds": seconds, "summary": json.loads(path.read_text(encoding="utf-8"))}


def ask(server: Server, host: str = "", password: str = "", path: str = "experiments/search?max_results=1") -> int:
    """Return the status of a request to the API under the name ``host``."""
    login = base64.b64encode(f"{server.user}:{password or server.password}".encode()).decode()
    headers = {"Authorization": f"Basic {login}"} | ({"Host": host} if host else {})
    try:
        request = urllib.request.Request(f"{server.uri}/api/2.0/mlflow/{path}", headers=headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_an_undisturbed_run_is_all_there(server: Server, place: Path, first: dict[str, Any]) -> None:
    """The audit of the outages would prove nothing, did it not find each value where nothing happened."""
    found = audit(server, place)
    assert found["wrong"] == []
    counts = found["counts"]
    assert counts["runs"] >= 9 and counts["points"] > 50 and counts["artifacts"] >= 15 and counts["models"] == 1, counts


def test_the_audit_sees_what_is_lost_and_what_is_doubled(
    server: Server, place: Path, first: dict[str, Any], tmp_path: Path
) -> None:
    """A test of outages that cannot fail would let every release through."""
    copy = tmp_path / "copy"
    shutil.copytree(place / "runs", copy / "runs", ignore=shutil.ignore_patterns("artifacts", ".cache"))
    journal = next((copy / "runs").glob("*/journals/fine_tune.jsonl"))
    more = {"event": "metrics", "time": time.time(), "values": {"train_loss": 0.125, "never": 1.0}, "step": 10_000}
    journal.write_text(journal.read_text(encoding="utf-8") + json.dumps(more) + "\n", encoding="utf-8")
    wrong = "\n".join(audit(server, copy)["wrong"])
    assert "fine_tune: LOST metric train_loss at 10000" in wrong and "fine_tune: LOST metric never" in wrong
    lines = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
    twice = next(line for line in lines if line["event"] == "metrics" and line["values"].get("val_accuracy"))

    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client = MlflowClient(server.uri, server.uri)
    experiment = client.get_experiment_by_name("graftwork").experiment_id
    (run,) = client.search_runs([experiment], "tags.`graftwork.step` = 'fine_tune'")
    extra = client.create_run(experiment, tags={**{k: run.data.tags[k] for k in ("graftwork.run", "graftwork.step")}})
    point = Metric("val_accuracy", 0.5, int(twice["time"] * 1000) + 1, twice["step"])
    client.log_batch(extra.info.run_id, [point])
    try:
        assert "DOUBLED: 1 parents" in "\n".join(audit(server, place)["wrong"])
    finally:
        client.delete_run(extra.info.run_id)
    assert audit(server, place)["wrong"] == []


def test_runs_that_lose_each_server_lose_nothing(
    server: Server, place: Path, weights: Path, first: dict[str, Any]
) -> None:
    """A night's training would be missing from the table, or stand in it twice, because a node was drained."""
    chance = random.Random(0)
    span = 0.7 * first["seconds"]  # some steps are reused
    played = [play(server, place, command(weights, EPOCHS, number), span, chance) for number in range(1, ROUNDS + 1)]
    print(json.dumps(played))
    for one in played:
        assert len(one["kills"]) == 3 and one["tries"][-1]["status"] == 0, one
        for tried in one["tries"][:-1]:
            assert tried["status"] == 1 and not tried["trace"] and "register_model failed" in tried["said"], tried
    found = audit(server, place)
    assert found["wrong"] == []
    assert found["counts"]["models"] == ROUNDS + 1


def test_a_refused_password_is_one_line_and_costs_no_training(
    server: Server, place: Path, weights: Path, first: dict[str, Any], tmp_path: Path
) -> None:
    """A password that was changed in the night would cost the night's training, or end in a trace that names no variable."""
    words = [*command(weights, EPOCHS, 900), "--register-as", "after refusal"]
    elsewhere = {"MLFLOW_EXPERIMENT_NAME": "refused"}
    done, _ = run_once(server, tmp_path / "refused", words, elsewhere | {"MLFLOW_TRACKING_PASSWORD": "stale"})
    said = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr, done
    assert [line.partition(": ")[2].partition(":")[0] for line in said] == [
        "drift is not judged",  # known at the start: there is no champion to compare with
        "step register_model failed",
    ]
    assert all("refuses the user or the password" in line and "MLFLOW_TRACKING_PASSWORD" in line for line in said), said
    (journals,) = (tmp_path / "refused" / "runs").glob("*/journals")
    assert '"train_loss"' in (journals / "fine_tune.jsonl").read_text(encoding="utf-8")
    again, _ = run_once(server, tmp_path / "refused", words, elsewhere)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "fine_tune" in again.stdout.rpartition("reused:")[2]


def test_no_password_is_on_a_command_line_or_in_a_log(server: Server, first: dict[str, Any]) -> None:
    """Every user of the machine could read the database's password, and whoever reads the logs as well."""
    family = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
    assert len(family) >= 3
    told = [" ".join(process.cmdline()) for process in family]
    told.append((server.folder / "mlflow.log").read_text(encoding="utf-8", errors="replace"))
    told.append(server.postgres.log_path.read_text(encoding="utf-8", errors="replace"))
    secrets = [
        server.password,
        server.postgres.password,
        server.postgres.uri,
        server.s3.secret,
        "shared by all replicas",
    ]
    for secret in secrets:
        assert not [text[:200] for text in told if secret in text]
    assert ask(server, password="guessed") == 401


def test_every_name_that_the_manifests_allow_is_answered(server: Server) -> None:
    """A step would be told 403 by its own server, since Kubernetes' names are none of MLflow's defaults."""
    names = [name for name in tracking_server.allowed_hosts().split(",") if not name.endswith("*")]
    assert {"mlflow.mlflow.svc", "mlflow.mlflow.svc:5000"} <= set(names)
    for host in [*names, f"localhost:{server.port}"]:
        assert ask(server, host) == 200, host
    for host in ("evil.example", "mlflow.mlflow.svc:80"):
        assert ask(server, host) == 403, host


def test_two_migrations_at_once_and_a_replica_that_waits(tmp_path: Path, server: Server) -> None:
    """Two replicas that make the tables at the same time leave half of them, and the database has to be made anew."""
    with postgres_server.serve(tmp_path / "postgres") as postgres:
        (tmp_path / "uri").write_text(postgres.uri, encoding="utf-8")
        variables = server.environment | {"MLFLOW_BACKEND_STORE_URI_FILE": str(tmp_path / "uri"), "WAIT_SECONDS": "0"}
        words = [PYTHON, str(tracking_server.ENTRY_POINT)]
        early = subprocess.run([*words, "wait"], env=variables, capture_output=True, text=True, check=False)
        assert early.returncode == 2 and "not those of this release" in early.stderr, early
        waiting = subprocess.Popen([*words, "wait"], env=variables | {"WAIT_SECONDS": "120"}, stdout=subprocess.DEVNULL)
        jobs = [subprocess.Popen([*words, "migrate"], env=variables, stderr=subprocess.DEVNULL) for _ in range(2)]
        assert [job.wait(120) for job in jobs] == [0, 0] and waiting.wait(120) == 0
        count = "SELECT count(*) FROM pg_tables WHERE schemaname = '{}'"
        assert int(postgres.psql("mlflow", count.format("public"))) > 30
        assert int(postgres.psql("mlflow", count.format("auth"))) > 3


def test_garbage_goes_and_what_is_kept_stays(
    server: Server, place: Path, first: dict[str, Any], tmp_path: Path
) -> None:
    """The bucket would grow for ever; or the champion's files would go with a run that somebody tidied away."""
    from mlflow import MlflowClient

    os.environ |= server.client_environment
    client = MlflowClient(server.uri, server.uri)
    (tmp_path / "a file.txt").write_text("once")
    run = client.create_run(client.create_experiment("garbage")).info
    client.log_artifact(run.run_id, str(tmp_path / "a file.txt"))
    keys = [entry["Key"] for entry in objects(server.s3) if run.run_id in entry["Key"]]
    assert len(keys) == 1
    client.delete_run(run.run_id)
    server.command("gc", **server.client_environment, GC_OLDER_THAN="1d0m")
    assert [e["Key"] for e in objects(server.s3) if run.run_id in e["Key"]] == keys, "deleted a moment ago"
    server.command("gc", **server.client_environment, GC_OLDER_THAN="0d0m")
    assert not [e["Key"] for e in objects(server.s3) if run.run_id in e["Key"]]
    found = audit(server, place)
    assert found["wrong"] == []


def objects(s3: s3_server.Server) -> list[dict[str, Any]]:
    pages = s3.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
    return [entry for page in pages for entry in page.get("Contents", [])]


def keep(script: str, server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run backup.sh or restore.sh as an administrator does, with the variables that the server has."""
    path = f"{postgres_server.programs()}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [str(FOLDER / script), *arguments],
        env=server.environment | {"PYTHON": PYTHON, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_backup_and_restore_after_everything_is_gone(
    server: Server, place: Path, first: dict[str, Any], tmp_path: Path
) -> None:
    """A backup that was never restored is none: the disk dies, and with it every model and the reasons why it was chosen."""
    backups = tmp_path / "backups"
    done = keep("backup.sh", server, str(backups))
    assert done.returncode == 0, done.stderr
    time.sleep(1)  # a backup is named by its second
    again = keep("backup.sh", server, str(backups))
    assert again.returncode == 0 and "0 of them new" in again.stdout, again
    newest = sorted(backups.glob("2*"))[-1]
    assert newest.stat().st_mode & 0o077 == 0, "others could read it"

    with contextlib.ExitStack() as stack:
        postgres = stack.enter_context(postgres_server.serve(tmp_path / "postgres"))
        s3 = stack.enter_context(s3_server.serve(tmp_path / "s3"))
        other = object.__new__(Server)  # nothing is migrated or started yet
        other.folder, other.postgres, other.s3, other.port = (
            tmp_path / "other",
            postgres,
            s3,
            s3_server.free_ports(1)[0],
        )
        other.uri, other.secrets = f"http://127.0.0.1:{other.port}", tmp_path / "secrets"
        (other.folder / "tmp").mkdir(parents=True)
        shutil.copytree(server.secrets, other.secrets)
        (other.secrets / "uri").write_text(postgres.uri, encoding="utf-8")

        victim = max((backups / "objects").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
        content = victim.read_bytes()
        victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        done = keep("restore.sh", other, str(newest))
        assert done.returncode == 2 and "missing or damaged" in done.stderr and done.stderr.count("\n") == 1, done
        assert not s3.client().list_buckets()["Buckets"], "something was changed"
        victim.write_bytes(content)

        done = keep("restore.sh", other, str(newest))
        assert done.returncode == 0, done.stderr
        done = keep("restore.sh", other, str(newest))
        assert done.returncode == 2 and "--replace" in done.stderr, done
        done = keep("restore.sh", other, str(newest), "--replace")
        assert done.returncode == 0, done.stderr
        other.command("migrate")
        other.start()
        try:
            assert audit(other, place)["wrong"] == []
            assert ask(other) == 200 and ask(other, password="guessed") == 401  # the accounts came along
            assert predictions(other, place) == predictions(server, place)
        finally:
            other.kill()
    os.environ |= server.client_environment


def predictions(server: Server, place: Path) -> list[list[float]]:
    """Load the champion from the registry and return what it says of ten test images."""
    import mlflow
    import pandas as pd

    from graftwork.dataset import open_dataset

    os.environ |= server.client_environment
    mlflow.set_tracking_uri(server.uri)
    mlflow.set_registry_uri(server.uri)
    summary = json.loads(next((place / "runs").glob("*/summary.json")).read_text(encoding="utf-8"))
    dataset = open_dataset(summary["files"]["dataset"])
    images = list(dataset.read(dataset.split("test").slice(0, 10)))
    model = mlflow.pyfunc.load_model(f"models:/{NAME}@champion")
    found = model.predict(pd.DataFrame({"image": images}))
    return [[float(value) for value in row[1:]] for row in found.itertuples(index=False)]


def test_the_image_serves_with_a_read_only_root(server: Server) -> None:
    """The pod would end at its first write, for Pod Security and the manifests leave it nothing but /tmp."""
    version = yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))["services"]["mlflow"]["image"]
    docker = shutil.which("docker", path="/usr/bin") or shutil.which("docker")
    if not docker or subprocess.run([docker, "image", "inspect", version], capture_output=True, check=False).returncode:
        pytest.skip(f"no Docker engine, or no image {version}: docker build -t {version} mlflow")
    (port,) = s3_server.free_ports(1)
    told = {
        k: v for k, v in server.environment.items() if k.startswith(("MLFLOW_", "AWS_")) and not k.endswith("_FILE")
    }
    told.pop("AWS_CA_BUNDLE", None)
    told |= {"MLFLOW_PORT": str(port), "MLFLOW_BACKEND_STORE_URI": server.postgres.uri}
    told |= {"MLFLOW_AUTH_ADMIN_PASSWORD": server.password, "MLFLOW_FLASK_SERVER_SECRET_KEY": "shared by all replicas"}
    name = f"graftwork-test-{port}"
    hardened = ["--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges"]
    words = [
        "run",
        "--rm",
        "--detach",
        "--network=host",
        f"--name={name}",
        *hardened,
        *(f"--env={key}" for key in told),
    ]
    subprocess.run([docker, *words, version], env=os.environ | told, check=True, capture_output=True)
    try:
        until = time.monotonic() + 120
        while time.monotonic() < until:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            time.sleep(0.2)
        logs = subprocess.run([docker, "logs", name], capture_output=True, text=True, check=False)
        replica = object.__new__(Server)
        replica.uri, replica.port = f"http://127.0.0.1:{port}", port
        assert ask(replica) == 200, logs.stderr[-2000:]
        who = subprocess.run([docker, "exec", name, "id", "-u"], capture_output=True, text=True, check=True)
        assert who.stdout.strip() == "1000"
    finally:
        subprocess.run([docker, "rm", "--force", name], capture_output=True, check=False)
