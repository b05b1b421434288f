"""The way to a KFP server: the real client, over HTTP, against a server that refuses, hangs, is too old or is none."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kfp_server import Server, serve
from typer.testing import CliRunner

from graftwork.errors import UserError
from graftwork.pipelines import cluster
from graftwork.pipelines.cli import app
from graftwork.pipelines.cluster import cluster_at

SUBMIT = ("submit", "--data", "s3://bucket/photos")
CREATE = ("schedule", "create", "sundays", "--cron", "0 3 * * 0", "--data", "s3://bucket/photos")
COMMANDS = [
    SUBMIT,
    ("status",),
    ("status", "x"),
    ("logs", "x"),
    ("cancel", "x"),
    CREATE,
    ("schedule", "list"),
    ("schedule", "pause", "x"),
    ("schedule", "resume", "x"),
    ("schedule", "delete", "x"),
]


@pytest.fixture(autouse=True)
def no_settings_of_the_developer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (*cluster.HOST_VARIABLES, cluster.TOKEN_VARIABLE, "KF_PIPELINES_UI_ENDPOINT", "GRAFTWORK_KFP_TIMEZONE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[Server]:
    with serve() as running:
        yield running


@pytest.fixture
def guarded() -> Iterator[Server]:
    with serve(token="right") as running:
        yield running


def refused(*arguments: str) -> str:
    """Run a command that must be refused, and return its line."""
    with pytest.raises(UserError) as error:
        CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    return str(error.value)


def unused_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_says_that_nothing_listens(command: tuple[str, ...]) -> None:
    """A port-forward that has ended would show as a trace of urllib3's."""
    host = unused_address()
    line = refused(*command, "--host", host)
    assert line.startswith(f"{host}: cannot be reached: nothing listens there; give the address")


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_asks_for_the_host(command: tuple[str, ...]) -> None:
    """Without a host the SDK tries the cluster's inner name, and prints "Failed to load kube config"."""
    assert "--host: is not given" in refused(*command)


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("http://no-such-host.invalid", "there is no host of this name"),
        ("ftp://x", "is no address"),
        ("http://", "is no address"),
        ("http://ada:secret@127.0.0.1:1", "holds a password"),
    ],
)
def test_an_address_that_is_none(host: str, message: str) -> None:
    """A typing mistake would end in a trace; and a password in the address would be printed with every link."""
    line = refused("status", "--host", host)
    assert message in line and "secret" not in line


def test_the_host_is_taken_from_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command would need the address again."""
    for name in cluster.HOST_VARIABLES:
        with monkeypatch.context() as patch:
            patch.setenv(name, server.host)
            result = CliRunner().invoke(app, ["status"], catch_exceptions=False)
            assert result.exit_code == 0 and "No runs" in result.output


def test_a_link_to_kfps_page_is_taken_as_its_address(server: Server) -> None:
    """What a user copies from her browser has '#/runs' in it."""
    result = CliRunner().invoke(app, ["status", "--host", f"{server.host}/#/runs"], catch_exceptions=False)
    assert "No runs" in result.output


# ---- who asks ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_without_a_token_nothing_is_done(command: tuple[str, ...], guarded: Server) -> None:
    """The SDK asks five times, with five traces and half a minute between."""
    before = time.monotonic()
    line = refused(*command, "--host", guarded.host)
    assert "the login is not taken (401)" in line and "--token-file or KFP_TOKEN" in line
    assert time.monotonic() - before < 10
    assert guarded.changes() == []


def test_a_wrong_token_is_not_shown(guarded: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token would stand in the log of whatever ran the command."""
    monkeypatch.setenv("KFP_TOKEN", "wrong-secret")
    line = refused(*SUBMIT, "--host", guarded.host)
    assert "(401)" in line and "wrong-secret" not in line
    assert guarded.changes() == []


def test_a_token_of_the_environment_opens(guarded: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody could use a server with a login."""
    monkeypatch.setenv("KFP_TOKEN", "right\n")
    result = CliRunner().invoke(app, ["status", "--host", guarded.host], catch_exceptions=False)
    assert result.exit_code == 0


def test_a_token_file_is_read_again(guarded: Server, tmp_path: Path) -> None:
    """A token lasts an hour and a training longer: --wait would end with 401 in the midst of it."""
    path = tmp_path / "token"
    path.write_text("right\n")
    with cluster_at(guarded.host, path) as opened:
        opened.client.list_runs()
        guarded.token = "new"
        path.write_text("new")
        opened.client.list_runs()
    assert [entry.status for entry in guarded.log[-2:]] == [200, 200]


def test_a_pods_own_token_opens(guarded: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a notebook in the cluster nobody has another token."""
    path = tmp_path / "token"
    path.write_text("right")
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(path))
    result = CliRunner().invoke(app, ["status", "--host", guarded.host, "--service-account"], catch_exceptions=False)
    assert result.exit_code == 0


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, ["--token-file", "FILE"], "cannot be read (No such file"),
        ("", ["--token-file", "FILE"], "is empty"),
        ("two words", ["--token-file", "FILE"], "more than one word"),
        ("tökén", ["--token-file", "FILE"], "no token"),
        ("right", ["--token-file", "FILE", "--service-account"], "give one of them"),
        (None, ["--service-account"], "outside a cluster give --token-file"),
    ],
)
def test_a_token_file_that_is_none(
    content: str | None, options: list[str], message: str, server: Server, tmp_path: Path
) -> None:
    """A typing mistake in the path would end in a trace, or go without a token and be called a wrong one."""
    path = tmp_path / "token"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    line = refused("status", "--host", server.host, *[str(path) if one == "FILE" else one for one in options])
    assert message in line
    assert server.log == []


def test_no_option_takes_a_token() -> None:
    """A token on a command line is seen by every user of the machine, and kept in the shell's history."""
    for command in COMMANDS:
        shown = CliRunner().invoke(app, [*command[: 2 if command[0] == "schedule" else 1], "--help"]).output
        assert "--token-file" in shown and "--token " not in shown


def test_settings_of_the_sdk_that_are_damaged(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK reads a file in the user's home, and fails on it with a trace that does not name it."""
    import kfp

    path = tmp_path / "context.json"
    path.write_text("{")
    monkeypatch.setattr(kfp.Client, "_LOCAL_KFP_CONTEXT", str(path))
    assert f"{path}: the SDK's own settings are no JSON" in refused("status", "--host", server.host)


def test_a_server_for_several_users_wants_a_profile() -> None:
    """The experiment would be made in no namespace, and the server's own words for that are no help."""
    with serve(multi_user=True) as running:
        assert "give your profile with --namespace" in refused(*SUBMIT, "--host", running.host)
        assert running.changes() == []
        with cluster_at(running.host, namespace="ada") as opened:
            assert opened.namespace == "ada"


# ---- what it answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_server_from_before_kfp_2(command: tuple[str, ...], server: Server) -> None:
    """A user would be told 404 and look for her run."""
    server.version = "v1beta1"
    line = refused(*command, "--host", server.host)
    assert "its Kubeflow Pipelines (1.8.5) has no API v2beta1" in line and "update it to 2.17" in line
    assert server.changes() == []


def test_a_server_that_is_no_kfp(server: Server) -> None:
    """A mistake in the port would be called a server that is too old."""
    server.fail(404)
    assert "there is no Kubeflow Pipelines; give the address" in refused(*SUBMIT, "--host", server.host)


def test_a_login_page_is_not_taken_for_an_answer(server: Server) -> None:
    """The SDK makes an empty object of a login page, and fails much later, with a trace."""
    server.version = "page"
    line = refused(*SUBMIT, "--host", server.host)
    assert "answers with a web page" in line and "--token-file" in line and "/pipeline" in line
    assert server.changes() == []


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (403, "not allowed (403: told to fail); give another --namespace"),
        (409, "one of this name already (409"),
        (500, "the server failed (500: told to fail); try again"),
        (503, "the server failed (503"),
        (400, "refused (400: told to fail)"),
        (0, "cannot be reached"),
    ],
)
def test_a_refusal_is_one_line_with_what_to_do(status: int, message: str, server: Server) -> None:
    """A user would read the SDK's traceback with the server's headers in it."""
    server.fail(status, "/pipelines")
    line = refused("status", "--host", server.host)
    assert message in line and "\n" not in line


def test_a_server_that_hangs_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK waits for ever."""
    monkeypatch.setattr(cluster, "TIMEOUTS", (0.3, 0.3))
    server.delay = 3.0
    before = time.monotonic()
    assert "does not answer in time" in refused("status", "--host", server.host)
    assert time.monotonic() - before < 10


def test_a_server_that_hangs_later_is_given_up_too(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that answers its health check alone would be waited for without end."""
    with pytest.raises(UserError, match="does not answer in time"), cluster_at(server.host) as opened:
        monkeypatch.setattr(cluster, "TIMEOUTS", (0.3, 0.3))
        server.delay = 3.0
        opened.client.list_runs()


def test_a_certificate_that_nobody_signed(tmp_path: Path) -> None:
    """In most companies the certificate is their own: the line must name the option that takes it."""
    import ssl
    import subprocess
    import threading

    pem = tmp_path / "pem"
    made = subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(pem), "-out", str(tmp_path / "crt")),
        ],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip("openssl makes no certificate here")
    with serve() as running:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / "crt", pem)
        listener = context.wrap_socket(socket.create_server(("127.0.0.1", 0)), server_side=True)
        threading.Thread(target=forward, args=(listener, running.host), daemon=True).start()
        host = f"https://127.0.0.1:{listener.getsockname()[1]}"
        assert "certificate is not trusted; give its authority with --ca-file" in refused("status", "--host", host)
        found = CliRunner().invoke(
            app, ["status", "--host", host, "--ca-file", str(tmp_path / "crt")], catch_exceptions=False
        )
        assert found.exit_code == 0
        assert "does not speak TLS; try http://" in refused("status", "--host", running.host.replace("http", "https"))
        listener.close()


def forward(listener: socket.socket, host: str) -> None:
    """Pass what comes over TLS on to the server."""
    import contextlib
    import threading

    def pump(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    while True:
        try:
            incoming, _ = listener.accept()
        except OSError:
            if listener.fileno() < 0:
                return
            continue  # a client that does not trust it
        outgoing = socket.create_connection(("127.0.0.1", int(host.rpartition(":")[2])))
        for pair in ((incoming, outgoing), (outgoing, incoming)):
            threading.Thread(target=pump, args=pair, daemon=True).start()
