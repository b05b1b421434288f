"""``--runner docker`` without an engine: what a container is given, what it is not, and what is said where there is no engine."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from graftwork.errors import UserError
from graftwork.pipelines import docker
from graftwork.pipelines.cli import app
from graftwork.sources import open_source

STEPS = (
    "ingest_data",
    "validate_data",
    "extract_features",
    "train_baseline",
    "fine_tune",
    "evaluate_model",
    "register_model",
)
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "s3-secret",
    "MLFLOW_TRACKING_PASSWORD": "mlflow-secret",
    "HF_TOKEN": "hub-secret",
    "HTTPS_PROXY": "http://me:proxy-secret@proxy:3128",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*docker.NETWORK, *docker.CERTIFICATES, "AWS_ENDPOINT_URL", "HF_HOME", "DOCKER_HOST"):
        monkeypatch.delenv(name, raising=False)


def parameters(**changed: Any) -> dict[str, Any]:
    return {"data": "digits", "weights": "", "learning_curve": ""} | changed


def photos(folder: Path, names: list[str]) -> list[Path]:
    """Write an image a name; each is another."""
    paths = [folder / name for name in names]
    for n, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16, 3), 40 + n, np.uint8)).save(path)
    return paths


def known_to(step: str, **changed: Any) -> set[str]:
    return set(docker.environment_for(step, parameters(**changed))) & set(SECRETS)


def test_secrets_reach_the_steps_that_use_them_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """`docker inspect` shows a container's environment to whoever may use the engine: the keys of the bucket have no place in that of a training."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    for step in ("validate_data", "train_baseline", "fine_tune", "evaluate_model"):
        assert known_to(step, data="s3://bucket/photos", weights="s3://bucket/weights.safetensors") == set()
    assert known_to("ingest_data") == {"HTTPS_PROXY"}
    assert known_to("ingest_data", data="s3://bucket/photos") == {"HTTPS_PROXY", "AWS_SECRET_ACCESS_KEY"}
    assert known_to("ingest_data", data="/d/photos.csv") == {"HTTPS_PROXY", "AWS_SECRET_ACCESS_KEY"}
    assert known_to("extract_features") == {"HTTPS_PROXY", "HF_TOKEN"}
    assert known_to("register_model") == {"HTTPS_PROXY", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD"}


def test_what_decides_over_the_last_bit_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """With other threads or other kernels than the process run, the same seed would give other weights."""
    wanted = {
        "OMP_NUM_THREADS": "3",
        "OPENBLAS_CORETYPE": "Haswell",
        "GRAFTWORK_CACHE": "/c",
        "GRAFTWORK_CHECKPOINTS": "/k",
    }
    for name, value in wanted.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GRAFTWORK_COMMIT", "of this machine")
    for step in STEPS:
        found = docker.environment_for(step, parameters())
        assert wanted.items() <= found.items()
        assert "GRAFTWORK_COMMIT" not in found, "the image's own commit is what ran"


def test_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server on 127.0.0.1 is this machine's, and not to be found from a container's own network; a training needs no network at all."""
    assert {step: docker.network_for(step) for step in STEPS} == {
        step: "bridge" if step in docker.REACHES else "none" for step in STEPS
    }
    for name, address in {
        "MLFLOW_TRACKING_URI": "http://me:word@127.0.0.1:5000",
        "AWS_ENDPOINT_URL": "http://localhost:8333",
        "https_proxy": "localhost:3128",
        "HF_ENDPOINT": "http://[::1]:80/hub",
    }.items():
        with monkeypatch.context() as context:
            context.setenv(name, address)
            assert docker.network_for("register_model") == "host", name
            assert docker.network_for("fine_tune") == "none"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://localhost.example.com:[broken")
    assert docker.network_for("register_model") == "bridge"


def test_links_are_followed_to_where_the_images_lie(tmp_path: Path) -> None:
    """A folder of links, as DVC and careful people make them, would be a folder of broken images in the container."""
    there = tmp_path / "disk"
    photos(there, ["cat/1.png", "deep/dogs/2.png", "other/3.png"])
    data = tmp_path / "photos é 1"
    photos(data, ["cat/0.png"])
    (data / "cat" / "1.png").symlink_to(there / "cat" / "1.png")
    (data / "dog").symlink_to(there / "deep" / "dogs")
    found = docker.data_places(str(data), open_source(str(data)))
    assert found == {data, there / "cat", there / "deep" / "dogs"}


def test_a_manifests_paths(tmp_path: Path) -> None:
    """Images beside the manifest are the easy half: a manifest may name files anywhere, and each has to be found."""
    photos(tmp_path, [f"disk/{c}/{n}.png" for c in "ab" for n in range(3)] + ["lists/c/9.png"])
    manifest = tmp_path / "lists" / "photos.csv"
    rows = [f"{tmp_path}/disk/{c}/{n}.png,{c}" for c in "ab" for n in range(3)] + ["c/9.png,a"]
    manifest.write_text("path,label\n" + "\n".join(rows) + "\n")
    found = docker.data_places(str(manifest), open_source(str(manifest)))
    for path in (manifest, tmp_path / "disk" / "b" / "2.png", manifest.parent / "c" / "9.png"):
        assert {path, *path.parents} & found, path


def test_folders_that_are_too_many_become_the_one_above(tmp_path: Path) -> None:
    """A manifest over ten thousand folders would be ten thousand mounts, which no engine starts a container with."""
    photos(tmp_path, [f"disk/{n}/a.png" for n in range(docker.MOST_MOUNTS + 2)])
    manifest = tmp_path / "lists" / "photos.csv"
    manifest.parent.mkdir()
    rows = [f"{tmp_path}/disk/{n}/a.png,{'ab'[n % 2]}" for n in range(docker.MOST_MOUNTS + 2)]
    manifest.write_text("path,label\n" + "\n".join(rows) + "\n")
    assert docker.data_places(str(manifest), open_source(str(manifest))) == {tmp_path}


def test_what_is_written_and_what_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results have to arrive here; a mistake in a step must not touch the pictures, nor the weights."""
    data = tmp_path / "photos"
    photos(data, ["a/0.png", "b/1.png"])
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"w")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("GRAFTWORK_CHECKPOINTS", str(tmp_path / "elsewhere" / "checkpoints"))
    given = parameters(data=str(data), weights=str(weights))
    found = docker.places(given, open_source(str(data)), tmp_path / "runs")
    assert found[data] is False and found[weights] is False
    for folder in ("runs", "elsewhere/checkpoints", "cache/graftwork"):
        assert found[tmp_path / folder] is True
        assert (tmp_path / folder).is_dir(), "the engine would make it, as root"


def test_a_registry_elsewhere_is_reached(tmp_path: Path) -> None:
    """A model would be registered without its files, which went down with the container."""
    database = tmp_path / "team's é" / "mlflow.db"
    database.parent.mkdir()
    with sqlite3.connect(database) as connection:
        connection.execute("create table experiments (artifact_location text)")
        connection.executemany(
            "insert into experiments values (?)", [[(tmp_path / "art é").as_uri()], ["s3://bucket/a"]]
        )
    from urllib.parse import quote

    assert set(docker.tracking_places(f"sqlite:///{quote(str(database))}")) == {database.parent, tmp_path / "art é"}
    assert docker.tracking_places("http://127.0.0.1:5000") == []


@pytest.mark.parametrize("place", ["/", "/usr", "/opt"])
def test_nothing_hides_the_image(place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder of this machine laid over the image's own would end in an error from the depths of the engine, or run other code."""
    monkeypatch.setenv("GRAFTWORK_CHECKPOINTS", place)
    with pytest.raises(UserError, match="folder of its own"):
        docker.places(parameters(), open_source("digits"), tmp_path)


def test_user_and_rights() -> None:
    """Files of root's in a user's folder, which only root can delete, are what containers are known for."""
    user, options = docker.fitting({}, {})
    assert user == f"{os.getuid()}:{os.getgid()}"
    assert options["cap_drop"] == ["ALL"] and "no-new-privileges" in options["security_opt"]
    rootless, _ = docker.fitting({"SecurityOptions": ["name=seccomp,profile=default", "name=rootless"]}, {})
    assert rootless == "0:0", "of an engine that is the caller's own, root is the caller"
    _, remapped = docker.fitting({"SecurityOptions": ["name=userns"]}, {})
    assert remapped["userns_mode"] == "host"
    for_gpu = {"Config": {"Env": ["NVIDIA_VISIBLE_DEVICES=all"]}}
    assert "device_requests" not in docker.fitting({"Runtimes": {"runc": {}}}, for_gpu)[1]
    assert "device_requests" in docker.fitting({"Runtimes": {"runc": {}, "nvidia": {}}}, for_gpu)[1]


def test_a_step_is_known_by_its_command() -> None:
    """A container that ended with status 0 has done its work only if the file is there that kfp writes last."""
    command = [
        "sh",
        "-c",
        "python3 -m x",
        "--executor_input",
        '{"outputs": {"outputFile": "/r/o.json"}}',
        "--function_to_execute",
        "fine_tune",
    ]
    assert docker.told_by(command) == ("fine_tune", Path("/r/o.json"))


STEP = """
import colorsys, json, os, signal, sys, time
print(json.dumps({"arguments": sys.argv[1:], "name": __name__, "runtime": os.environ["_KFP_RUNTIME"], "component": open(sys.argv[2]).read()}))
if "wait" in sys.argv:
    signal.signal(signal.SIGTERM, lambda number, frame: (print("asked to stop", flush=True), sys.exit(130)))
    print("waits", flush=True)
    time.sleep(60)
sys.exit(7)
"""
# As kfp's, whose shell takes the component's source as $0 and what follows as arguments.
SCRIPT = """
folder=$(mktemp -d)
printf "%s" "$0" > "$folder/component.py"
_KFP_RUNTIME=true     python3 -m     a_step     --path     "$folder/component.py"     "$@"
"""


def standing_by(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    """Start what a container of the next step runs, and, if there are any, give it a command with these arguments."""
    (folder / "a_step.py").write_text(STEP)
    line = [sys.executable, "-m", "graftwork.pipelines.warm", "stand-by", "colorsys", "no_such_module"]
    process = subprocess.Popen(
        line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder
    )
    if arguments:
        assert process.stdin
        process.stdin.write(
            json.dumps(["sh", "-ec", SCRIPT, "print('python3 is in this source')\n", *arguments]) + "\n"
        )
        process.stdin.flush()
    return process


@pytest.mark.skipif(sys.platform != "linux", reason="containers run Linux")
def test_a_container_that_stands_by_becomes_the_step(tmp_path: Path) -> None:
    """Whatever the step is called with has to arrive to the letter, and how it ends has to be how the container ends."""
    process = standing_by(tmp_path, "--input", '{"data": "/home/u/python3-course", "é": "a\\nb"}', "")
    said, _ = process.communicate(timeout=30)
    found = json.loads(said)
    assert found["arguments"][2:] == ["--input", '{"data": "/home/u/python3-course", "é": "a\\nb"}', ""]
    assert found["component"] == "print('python3 is in this source')\n"
    assert (found["name"], found["runtime"], process.returncode) == ("__main__", "true", 7)


@pytest.mark.skipif(sys.platform != "linux", reason="containers run Linux")
def test_a_container_that_stands_by_can_be_stopped(tmp_path: Path) -> None:
    """One that went on waiting would hold a gigabyte of memory; one that is at work has a checkpoint to write."""
    unused = standing_by(tmp_path)
    assert unused.stdin
    unused.stdin.close()
    assert unused.wait(30) == 0

    at_work = standing_by(tmp_path, "wait")
    assert at_work.stdout
    while "waits" not in (line := at_work.stdout.readline()):
        assert line, "it ended"
    at_work.terminate()
    said, _ = at_work.communicate(timeout=30)
    assert (at_work.returncode, said) == (130, "asked to stop\n")


def refused(*arguments: str, **environment: str) -> str:
    result = CliRunner(env=environment).invoke(app, ["run", "--data", "digits", *arguments])
    assert isinstance(result.exception, UserError), result.output
    return str(result.exception)


def test_no_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace of three libraries is no answer to "is Docker running?"; and nothing may have been begun."""
    monkeypatch.chdir(tmp_path)
    said = refused("--runner", "docker", DOCKER_HOST="unix:///nowhere/docker.sock")
    assert said.startswith("--runner docker: no container engine at /nowhere/docker.sock; install one")
    (tmp_path / "stale.sock").write_text("")
    said = refused("--runner", "docker", DOCKER_HOST=f"unix://{tmp_path}/stale.sock")
    assert "does not answer" in said and "Traceback" not in said
    said = refused("--runner", "docker", DOCKER_HOST="tcp://build.example.com:2376")
    assert "is another machine" in said
    assert "add --runner docker" in refused("--image", "x:1")
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody who may not use the socket")
def test_no_permission_on_the_socket(tmp_path: Path) -> None:
    """The first thing that happens to a new user of Docker on Linux: she has to be told to join its group."""
    import socket

    folder = Path("/tmp") / f"graftwork-{os.getpid()}"
    folder.mkdir(mode=0o755)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(folder / "docker.sock"))
            server.listen()
            (folder / "docker.sock").chmod(0o600)
            # Python's own files may be root's alone: what is needed is imported first.
            code = (
                "import os, docker.errors, requests\nfrom graftwork.pipelines.docker import find_engine\n"
                "os.setgroups([]); os.setgid(65534); os.setuid(65534)\nfind_engine()"
            )
            environment = os.environ | {"DOCKER_HOST": f"unix://{folder}/docker.sock", "HOME": "/tmp"}
            ran = subprocess.run(
                [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd="/", timeout=60
            )
    finally:
        (folder / "docker.sock").unlink(missing_ok=True)
        folder.rmdir()
    assert (
        "UserError: --runner docker: you may not use the container engine" in ran.stderr and "its group" in ran.stderr
    )
