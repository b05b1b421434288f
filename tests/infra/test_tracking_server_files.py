"""What ``mlflow/`` is made of: the entry point, the pinned packages, the compose file and the manifests, each without a server."""

import configparser
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "mlflow"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
PASSWORD = r"p:a\s%s @w/'"  # as an address it is:
QUOTED = "p%3Aa%5Cs%25s%20%40w%2F%27"
URI = f"postgresql://m%40x:{QUOTED}@db.example:5433/runs?sslmode=require"


@pytest.fixture
def entry_point(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``mlflow/entrypoint.py`` as a module, with an environment that is put back."""
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "AWS_", "PG"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    spec = importlib.util.spec_from_file_location("entrypoint", FOLDER / "entrypoint.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "AWS_", "PG"))}
    command = [sys.executable, str(FOLDER / "entrypoint.py"), *words]
    return subprocess.run(command, env=kept | variables, capture_output=True, text=True, check=False)


# ---- the folder ------------------------------------------------------------------------------------------------------------------


def test_the_folder_does_not_stand_in_the_librarys_way() -> None:
    """Every command given in a checkout would fail, for Python would take the folder mlflow/ for MLflow."""
    assert not list(FOLDER.rglob("__init__.py"))
    script = "import mlflow, mlflow.version; print(mlflow.__file__, mlflow.version.VERSION)"
    for options in (["-c", script], ["-m", "pytest", "--version"]):
        done = subprocess.run([sys.executable, *options], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert str(FOLDER) not in done.stdout and "site-packages" in done.stdout


def test_packages_are_those_that_the_tests_ran_with() -> None:
    """The server would run another MLflow than the one that the project was tested against, and its tables be newer than the clients."""
    pins = pinned(FOLDER / "requirements.txt")
    tested = pinned(ROOT / "constraints.txt")
    assert {name: pin for name, pin in pins.items() if tested.get(name, pin) != pin} == {}
    assert set(pins) - set(tested) <= {"flask-wtf", "wtforms", "psycopg", "psycopg-binary"}
    assert {"mlflow", "flask-wtf", "psycopg-binary", "boto3"} <= set(pins)
    assert not {"torch", "timm", "scikit-learn", "kfp"} & set(pins)


def pinned(path: Path) -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    pairs = [line.split("==") for line in lines if line]
    assert all(len(pair) == 2 for pair in pairs), "a package without its release"
    return {re.sub(r"[-_.]+", "-", name).lower(): pin for name, pin in pairs}


# ---- the entry point -------------------------------------------------------------------------------------------------------------


def test_secrets_come_from_files(entry_point: ModuleType, tmp_path: Path) -> None:
    """A password with the line's end of an editor would be another password, and nobody would see why it is refused."""
    (tmp_path / "key").write_text(" a key \r\n")
    assert entry_point.secrets_from_files({"MLFLOW_FLASK_SERVER_SECRET_KEY_FILE": str(tmp_path / "key")}) == {
        "MLFLOW_FLASK_SERVER_SECRET_KEY": " a key "
    }


@pytest.mark.parametrize(
    ("words", "variables", "wanted"),
    [
        (["sevre"], {}, "sevre: is no command; give one of serve, "),
        (["serve", "--workers=9"], {}, "is no command"),
        (["serve"], {}, "MLFLOW_BACKEND_STORE_URI, MLFLOW_ARTIFACTS_DESTINATION, "),
        (
            ["migrate"],
            {"MLFLOW_BACKEND_STORE_URI_FILE": "/no/such"},
            "MLFLOW_BACKEND_STORE_URI_FILE: /no/such cannot be",
        ),
        (["migrate"], {"MLFLOW_BACKEND_STORE_URI": URI, "MLFLOW_BACKEND_STORE_URI_FILE": "/x"}, "both are set"),
        (["migrate"], {"MLFLOW_BACKEND_STORE_URI": "sqlite:///mlflow.db"}, "no complete address of PostgreSQL"),
        (["migrate"], {"MLFLOW_BACKEND_STORE_URI": "postgresql://u:hush/hush@h:5432/d"}, "%2F"),
        (["migrate"], {"MLFLOW_BACKEND_STORE_URI": "postgresql://u:hush@h"}, "no complete address"),
        (["bucket"], {"MLFLOW_ARTIFACTS_DESTINATION": "/data"}, "give s3://BUCKET/PREFIX"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_variable(
    words: list[str], variables: dict[str, str], wanted: str
) -> None:
    """A container would loop over a trace of thirty lines, with the password among them."""
    done = run(*words, **variables)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and wanted in done.stderr, done
    assert "hush" not in done.stderr + done.stdout and not done.stdout


def test_a_database_that_is_away_is_one_line_without_the_password() -> None:
    """The log of the Job, which many may read, would hold the password of the database."""
    uri = f"postgresql://mlflow:{QUOTED}@127.0.0.1:1/runs"
    pytest.importorskip("psycopg", reason="pip install 'psycopg[binary]'")
    done = run("check", MLFLOW_BACKEND_STORE_URI=uri, MLFLOW_ARTIFACTS_DESTINATION="s3://b/a")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "database: does not answer" in done.stderr, done
    assert PASSWORD not in done.stderr and QUOTED not in done.stderr


def test_passwords_leave_the_addresses_and_arrive(entry_point: ModuleType, tmp_path: Path) -> None:
    """With a colon, a percent sign or a slash in her password, a user could not start the server, or would read it in the log."""
    os.environ |= entry_point.DEFAULTS | {"MLFLOW_BACKEND_STORE_URI": URI}
    accounts = entry_point.keep_passwords_apart(tmp_path)
    assert os.environ["MLFLOW_BACKEND_STORE_URI"] == "postgresql+psycopg://m%40x@db.example:5433/runs?sslmode=require"
    assert (tmp_path / "pgpass").read_text() == "db.example:5433:runs:m@x:p\\:a\\\\s%s @w/'\n"
    assert os.environ["PGPASSFILE"] == str(tmp_path / "pgpass")
    told = configparser.ConfigParser()  # as MLflow reads it, with interpolation
    told.read(os.environ["MLFLOW_AUTH_CONFIG_PATH"])
    assert told["mlflow"]["database_uri"] == accounts
    from sqlalchemy.engine import make_url

    address = make_url(accounts)
    assert address.username == "m@x" and address.password is None and address.database == "runs"
    assert address.query == {"sslmode": "require", "options": "-csearch_path=auth"}
    kept = "".join(path.read_text() for path in tmp_path.iterdir() if path.name != "pgpass")
    assert PASSWORD not in kept and QUOTED not in kept


# ---- compose ---------------------------------------------------------------------------------------------------------------------


def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8")))


def test_compose_opens_nothing_to_the_network_and_holds_no_secret() -> None:
    """A laptop in a café would offer its database to the room."""
    services = compose()["services"]
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert len(ports) == 3 and all(port.startswith("127.0.0.1:") for port in ports)
    for name, service in services.items():
        image, _, tag = service["image"].rpartition(":")
        assert image and re.search(r"\d", tag), f"{name}: {service['image']} is not pinned"
        assert service["cap_drop"] == ["ALL"] and service["read_only"] and service["user"], name
        for variable, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|KEY|URI$", variable) and variable != "MLFLOW_TRACKING_URI":
                assert str(value).startswith("/run/secrets/"), f"{name}: {variable} is given in the open"
    assert services["mlflow"]["image"] == f"ghcr.io/graftwork/graftwork-mlflow:{VERSION}"
    waits_for = {name: told["condition"] for name, told in services["mlflow"]["depends_on"].items()}
    assert set(waits_for.values()) == {"service_completed_successfully"}
    assert {"postgres", "seaweedfs", "mlflow"} == {name for name, one in services.items() if "healthcheck" in one}


def test_the_secrets_of_compose_are_made_once_and_fit_together(tmp_path: Path) -> None:
    """A second call would change the password of a database that knows the first, and lock the user out of her runs."""
    shutil.copy(FOLDER / "compose-secrets.sh", tmp_path)
    done = subprocess.run(["sh", str(tmp_path / "compose-secrets.sh")], capture_output=True, text=True, check=True)
    folder = tmp_path / "secrets"
    first = {path.name: path.read_text() for path in folder.iterdir()}
    wanted = {Path(told["file"]).name for told in compose()["secrets"].values()}
    assert set(first) == wanted and all(len(text.strip()) >= 20 for text in first.values())
    assert folder.stat().st_mode & 0o777 == 0o700
    assert first["backend-uri"].strip() == f"postgresql://mlflow:{first['postgres-password']}@postgres:5432/mlflow"
    (login,) = yaml.safe_load(first["s3-identities.json"])["identities"][0]["credentials"]
    assert login == {"accessKey": first["s3-key"], "secretKey": first["s3-secret"]}
    assert not any(text.strip() in done.stdout for text in first.values())
    subprocess.run(["sh", str(tmp_path / "compose-secrets.sh")], capture_output=True, check=True)
    assert {path.name: path.read_text() for path in folder.iterdir()} == first


# ---- Kubernetes ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["kustomize", "kustomize/with-postgres"])
def built(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    program = shutil.which("kubectl") or shutil.which("kustomize")
    if not program:
        pytest.skip("neither kubectl nor kustomize is installed")
    words = ["kustomize"] if program.endswith("kubectl") else ["build"]
    done = subprocess.run([program, *words, str(FOLDER / request.param)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [one for one in yaml.safe_load_all(done.stdout) if one]


def pods(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    found = {}
    for one in objects:
        spec = one.get("spec", {})
        if one["kind"] == "CronJob":
            spec = spec["jobTemplate"]["spec"]
        if "template" in spec:
            found[f"{one['kind']} {one['metadata']['name']}"] = spec["template"]["spec"]
    return found


def test_every_pod_is_restricted_and_its_root_read_only(built: list[dict[str, Any]]) -> None:
    """The namespace asks for Pod Security "restricted": a pod that misses one field is not made, and no server comes up."""
    assert len(pods(built)) >= 3
    for name, spec in pods(built).items():
        assert spec["securityContext"]["runAsNonRoot"] is True and spec["securityContext"]["runAsUser"] > 0, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert spec["automountServiceAccountToken"] is False and spec["enableServiceLinks"] is False, name
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            told = container["securityContext"]
            assert told["allowPrivilegeEscalation"] is False and told["capabilities"] == {"drop": ["ALL"]}, name
            assert told["readOnlyRootFilesystem"] is True, name
            assert {"cpu", "memory"} <= set(container["resources"]["requests"]), name
            assert "/tmp" in [mount["mountPath"] for mount in container["volumeMounts"]], name


def test_no_secret_is_in_the_manifests_and_each_that_is_named_is_documented(built: list[dict[str, Any]]) -> None:
    """A password in a manifest ends in the repository; a Secret that nobody told her of leaves her pods waiting for ever."""
    assert not [one for one in built if one["kind"] == "Secret"]
    example = (FOLDER / "example.env").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^# ---- ([\w-]+).*?\n(.*?)(?=^# ----|\Z)", example, re.M | re.S))
    named: set[str] = set()
    for spec in pods(built).values():
        named |= {volume["secret"]["secretName"] for volume in spec.get("volumes", []) if "secret" in volume}
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            named |= {e["secretRef"]["name"] for e in container.get("envFrom", []) if "secretRef" in e}
            for variable in container.get("env", []):
                told = variable.get("valueFrom", {}).get("secretKeyRef")
                if told:
                    named.add(told["name"])
                    assert f"{told['key']}=" in sections[told["name"]]
                assert "PASSWORD" not in variable["name"] or "value" not in variable or "FILE" in variable["name"]
    assert {"mlflow-server", "mlflow-s3"} <= named <= set(sections)


def test_replicas_images_and_the_name_of_the_migration_belong_together(built: list[dict[str, Any]]) -> None:
    """A new release under the old Job's name cannot be applied, and two releases at once would write to the same tables."""
    deployment = next(one for one in built if one["kind"] == "Deployment")["spec"]
    assert deployment["replicas"] == 2
    assert deployment["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    server = deployment["template"]["spec"]["containers"][0]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server[probe]["httpGet"] == {"path": "/health", "port": "http"}
    assert [c["args"] for c in deployment["template"]["spec"]["initContainers"]] == [["wait"]]
    ours = {
        container["image"]
        for spec in pods(built).values()
        for container in [*spec["containers"], *spec.get("initContainers", [])]
        if "graftwork" in container["image"]
    }
    assert ours == {f"ghcr.io/graftwork/graftwork-mlflow:{VERSION}"}
    jobs = {one["metadata"]["name"] for one in built if one["kind"] == "Job"}
    assert jobs <= {f"mlflow-{what}-{VERSION.replace('.', '-')}" for what in ("migrate", "bucket")} and jobs
    for one in built:  # a Job's template may not change, and the ConfigMap's name does
        if one["kind"] == "Job":
            assert "configMapRef" not in str(one)


def test_allowed_hosts_hold_every_form_that_clients_use(built: list[dict[str, Any]]) -> None:
    """A step would be told 403, "DNS rebinding attack", by its own server."""
    config = next(one for one in built if one["kind"] == "ConfigMap")["data"]
    allowed = config["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    from mlflow.server.security_utils import is_allowed_host_header

    for name in ("mlflow", "mlflow.mlflow", "mlflow.mlflow.svc", "mlflow.mlflow.svc.cluster.local"):
        assert is_allowed_host_header(allowed, name) and is_allowed_host_header(allowed, f"{name}:5000"), name
    assert is_allowed_host_header(allowed, "127.0.0.1:18080") and is_allowed_host_header(allowed, "localhost:5000")
    for name in ("evil.example", "mlflow.mlflow.svc.evil.example:5000", "10.0.0.1:5000"):
        assert not is_allowed_host_header(allowed, name), name
