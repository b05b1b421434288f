"""A real PostgreSQL server on loopback, for tests and benchmarks: Debian's ``postgresql``, which can be killed and started again."""

import contextlib
import functools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

START_SECONDS = 60


@functools.cache
def programs() -> Path | None:
    """Return the folder of PostgreSQL's programs, the newest release; None where it is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda p: int(p.parts[-3]))
    on_path = shutil.which("postgres")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


def missing() -> str:
    """Return why no server can be started on this machine; "" if one can."""
    if programs() is None:
        return "PostgreSQL is not installed: apt-get install postgresql"
    if os.getuid() == 0 and not shutil.which("setpriv"):
        return "PostgreSQL does not run as root, and there is no setpriv: apt-get install util-linux"
    return ""


class Server:
    """``user``, with ``password``, owns the database ``database``. The password stands in no address on a command line."""

    # What trips a careless quotation: an address, libpq's password file and configparser each mean something by one of these.
    user, password, database = "mlflow", r"p:a\s%s @word/'", "mlflow"

    def __init__(self, folder: Path) -> None:
        # A user without rights must reach it, and pytest's own folders are the caller's alone; a socket's path may be 107 long.
        self.folder = Path(tempfile.mkdtemp(prefix="graftwork-pg-", dir="/tmp"))
        self.log_path = folder / "postgres.log"
        folder.mkdir(parents=True, exist_ok=True)
        if os.getuid() == 0:
            self.account = next(a for a in (_account("postgres"), _account("nobody")) if a)
            os.chown(self.folder, self.account.pw_uid, self.account.pw_gid)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        secret = self.folder / "password"
        secret.write_text(f"{self.password}\n", encoding="utf-8")
        if os.getuid() == 0:
            os.chown(secret, self.account.pw_uid, self.account.pw_gid)
        initdb = [f"--pgdata={self.folder}/data", f"--username={self.user}", f"--pwfile={secret}", "--encoding=UTF8"]
        done = self._run("initdb", *initdb, "--auth=scram-sha-256", "--no-locale")
        assert done.returncode == 0, done.stdout + done.stderr
        secret.unlink()
        self.start()
        self.psql("postgres", f"CREATE DATABASE {self.database}")

    @property
    def uri(self) -> str:
        """The address as MLflow takes it, with the password."""
        from urllib.parse import quote

        return f"postgresql://{self.user}:{quote(self.password, safe='')}@127.0.0.1:{self.port}/{self.database}"

    def start(self) -> None:
        options = ["-p", str(self.port), "-h", "127.0.0.1", "-k", str(self.folder)]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*self._prefix(), str(programs() / "postgres"), "-D", f"{self.folder}/data", *options],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"PostgreSQL did not start: {self.log_path.read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)

    def answers(self) -> bool:
        """Whether it takes connections: while it recovers from a kill, it refuses them."""
        ready = [str(programs() / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run(ready, check=False).returncode == 0

    def psql(self, database: str, statement: str) -> str:
        """Run a statement as the owner and return what it printed."""
        done = subprocess.run(
            [str(programs() / "psql"), "-XAtq", "-v", "ON_ERROR_STOP=1", "-d", database],
            input=statement,
            capture_output=True,
            text=True,
            env=os.environ | self.environment,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which PostgreSQL's own programs find the server."""
        where = {"PGHOST": "127.0.0.1", "PGPORT": str(self.port)}
        return where | {"PGUSER": self.user, "PGPASSWORD": self.password, "PGDATABASE": self.database}

    def kill(self) -> None:
        """End the server and every process that serves a connection with SIGKILL: what was not on the disk is gone."""
        with contextlib.suppress(ProcessLookupError):
            # Each of its processes leads a group of its own, and all are of one session.
            for process in _session(self.process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        self.process.wait()

    def restart(self) -> None:
        """Start it again, on the same port, with what it had confirmed."""
        if self.process.poll() is None:
            self.kill()
        self.start()

    def remove(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _prefix(self) -> list[str]:
        """What makes a command run as a user without rights, where this one is root: PostgreSQL refuses root."""
        if os.getuid() != 0:
            return []
        return ["setpriv", f"--reuid={self.account.pw_uid}", f"--regid={self.account.pw_gid}", "--clear-groups", "--"]

    def _run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*self._prefix(), str(programs() / program), *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)


def _account(name: str) -> pwd.struct_passwd | None:
    with contextlib.suppress(KeyError):
        return pwd.getpwnam(name)
    return None


def _session(leader: int) -> list[int]:
    """Return the processes of a session, the leader first: none of another, whatever its name."""
    import psutil

    found = [leader]
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if process.pid != leader and os.getsid(process.pid) == leader:
                found.append(process.pid)
    return found


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """Run a server that is gone, with its data, at the end; its log stays in ``folder``."""
    server = Server(folder)
    try:
        yield server
    finally:
        server.remove()
