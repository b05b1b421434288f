"""Objects in S3 or in a store that speaks its language (MinIO, SeaweedFS, Ceph, R2, ...): ``s3://bucket/prefix``.

Endpoint and credentials come from where every AWS tool takes them: ``AWS_ENDPOINT_URL``, ``AWS_ACCESS_KEY_ID``, ``AWS_PROFILE``, the role of
the machine. ``GRAFTWORK_S3_ANONYMOUS=1`` asks without credentials, for public buckets.
"""

import functools
import hashlib
import http.client
import os
import random
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, NoReturn, TypeVar

from graftwork.errors import UserError, one_line
from graftwork.sources.record import (
    AS_IT_IS,
    DataSource,
    Layout,
    Reading,
    Record,
    check_layout,
    modality_of,
    printable,
    settle,
)

ANONYMOUS = "GRAFTWORK_S3_ANONYMOUS"  # environment: 1 asks without credentials
READERS = 32  # of small objects: near by, 8 are as fast and Python's lock is the limit; over a network most of the time is waiting
CONNECT_SECONDS = 5.0
READ_SECONDS = 20.0  # without a single byte
ATTEMPTS = 3  # of boto3, within a second or three; what goes on longer than that is what patience is for
PATIENCE = 60.0  # seconds that a store which has answered before may be away: a restart, an upgrade
LONGEST_PAUSE = 2.0  # seconds between attempts
FEW = 8  # objects under one prefix up to which asking for each is cheaper than listing the prefix
PAGE = 1000  # keys a page, S3's limit
T = TypeVar("T")


def open_s3(uri: str, reading: Reading = AS_IT_IS) -> DataSource | None:
    """Return the labelled set of objects below ``uri``, which is listed here."""
    return S3Source(uri, reading.modality) if uri.startswith("s3://") else None


class S3Source:
    """``CLASS/*.jpg`` or ``train|val|test/CLASS/*.jpg`` below a prefix, as in a folder; of texts, ``*.txt``."""

    readers = READERS

    def __init__(self, uri: str, modality: str = "auto") -> None:
        shown = one_line(uri)
        self.bucket, path = split_uri(uri)
        self.prefix = f"{path.rstrip('/')}/" if path.strip("/") else ""
        self.name = printable(PurePosixPath(self.prefix or self.bucket).name) or "data"
        self.store = connect(uri)
        pages = list_pages(self.store, uri, self.bucket, self.prefix)
        listed = [found for page in pages for found in page if not found[0].endswith("/")]  # "/": marks a folder
        if not listed:
            raise UserError(f"data {shown}: there is no object below it; check the bucket and the prefix")
        listed.sort()  # S3's own order already, and not every store's; Python compares text as UTF-8 would
        start = len(self.prefix)
        self.modality = settle(lambda: (key[start:] for key, _ in listed), modality)
        tops = {
            key[start:].lstrip("/").partition("/")[0]
            for key, _ in listed
            if "/" in key[start:] and modality_of(key) == self.modality
        }
        self.layout = Layout(sorted(tops), self.modality)
        self._files: list[tuple[str, str, str, str]] = []  # key, mark, label, split: 300 bytes an object
        for key, mark in listed:
            member = self.layout.place(tuple(part for part in key[start:].split("/") if part))
            if member:
                self._files.append((key, mark, sys.intern(member.label), member.split))
        check_layout(shown, self.layout, {label for _, _, label, _ in self._files}, len(self._files))

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"s3://{self.bucket}/{self.prefix}\n".encode())
        for key, mark, _, _ in self._files:
            digest.update(f"{key}\0{mark}\n".encode())
        return digest.hexdigest()[:32]

    def records(self) -> Iterator[Record]:
        for key, mark, label, split in self._files:
            yield Record(printable(key[len(self.prefix) :]), label, split, S3Object(self.store, self.bucket, key, mark))

    def __len__(self) -> int:
        return len(self._files)

    def skipped(self) -> dict[str, int]:
        return dict(self.layout.skipped)


# ---- contents ------------------------------------------------------------------------------------------------------------------


class Store(NamedTuple):
    """A connection that every thread shares."""

    client: Any  # boto3's
    direct: bool  # no proxy lies between
    tls: ssl.SSLContext
    idle: dict[str, list[http.client.HTTPConnection]]  # of the short way, by scheme and host


class S3Object(NamedTuple):
    """Contents in an object, as it was when it was listed."""

    store: Store
    bucket: str
    key: str
    mark: str  # ETag and size, as in "9e10...-15000"

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.key).suffix.lower()

    def version(self) -> str:
        return self.mark

    def read(self) -> bytes:
        """Return the object, whole and as it was listed.

        Raises:
            OSError: it is not there any more, or is another one. UserError: the store is away, or refuses.
        """
        data = self._short_way()
        return self._long_way() if data is None else data

    def _short_way(self) -> bytes | None:
        """Get it with a third of the work of boto3's ``get_object``; None: something is not as it should be, and boto3 shall see to it."""
        from botocore.exceptions import BotoCoreError

        etag, _, size = self.mark.rpartition("-")
        try:
            url = self.store.client.generate_presigned_url("get_object", {"Bucket": self.bucket, "Key": self.key})
        except BotoCoreError:
            return None
        data = get(self.store, url, {"If-Match": f'"{etag}"'} if etag else {}) if self.store.direct else None
        return data if data is not None and len(data) == int(size) else None

    def _long_way(self) -> bytes:
        from botocore.exceptions import ClientError

        etag, _, size = self.mark.rpartition("-")
        condition = {"IfMatch": f'"{etag}"'} if etag else {}

        def get() -> bytes:
            answer = self.store.client.get_object(Bucket=self.bucket, Key=self.key, **condition)
            if answer["ContentLength"] != int(size):  # of a store that knows no If-Match
                raise OSError("changed while it was read")
            return answer["Body"].read()  # raises where the body is cut short

        uri = f"s3://{self.bucket}/{self.key}"
        try:
            return patiently(uri, get, PATIENCE, unwrapped=("NoSuchKey", "404", "PreconditionFailed", "412"))
        except ClientError as error:
            changed = "412" in (code_of(error), str(status_of(error))) or code_of(error) == "PreconditionFailed"
            raise OSError(f"{'changed' if changed else 'deleted'} while it was read") from None

    def sha256(self) -> str:
        return hashlib.sha256(self.read()).hexdigest()


def get(store: Store, url: str, headers: dict[str, str]) -> bytes | None:
    """Return what is at ``url``; None: the answer was not 200, or none came. Connections are kept open."""
    scheme, _, rest = url.partition("://")
    host, _, path = rest.partition("/")
    idle = store.idle.setdefault(f"{scheme}://{host}", [])
    try:
        connection = idle.pop()
    except IndexError:
        connection = (
            http.client.HTTPSConnection(host, timeout=READ_SECONDS, context=store.tls)
            if scheme == "https"
            else http.client.HTTPConnection(host, timeout=READ_SECONDS)
        )
    try:
        connection.request("GET", f"/{path}", headers=headers)
        answer = connection.getresponse()
        data = answer.read()
    except (OSError, http.client.HTTPException):
        connection.close()
        return None
    idle.append(connection)
    return data if answer.status == 200 else None


# ---- single objects, for other sources -----------------------------------------------------------------------------------------


def read_object(uri: str) -> bytes:
    """Return the contents of the object ``uri``.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    bucket, key = split_uri(uri, key_needed=True)
    client = connect(uri).client
    return patiently(uri, lambda: client.get_object(Bucket=bucket, Key=key)["Body"].read(), PATIENCE)


def object_version(uri: str) -> str:
    """Return what changes whenever the object ``uri`` changes: its ETag and size.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    bucket, key = split_uri(uri, key_needed=True)
    client = connect(uri).client
    return mark_of(patiently(uri, lambda: client.head_object(Bucket=bucket, Key=key)), "ContentLength")


def download(uri: str, path: Path, progress: Callable[[int, int], None] | None = None, what: str = "data") -> None:
    """Copy the object ``uri`` to ``path``, several parts at once; the file is there whole or not at all.

    Args:
        progress: is told the bytes that are there and those that there are, from several threads.
        what: begins the message of an error.

    Raises:
        UserError: there is no such object, or it cannot be read. OSError: ``path`` cannot be written.
    """
    bucket, key = split_uri(uri, key_needed=True, what=what)
    client = connect(uri, what).client
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")

    def fetch() -> None:
        total = client.head_object(Bucket=bucket, Key=key)["ContentLength"]
        done = 0

        def count(more: int) -> None:  # less than 0 where a part is fetched again
            nonlocal done
            done += more
            if progress:
                progress(done, total)

        client.download_file(bucket, key, str(partial), Callback=count)

    try:
        patiently(uri, fetch, PATIENCE, what=what)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def objects(uris: list[str]) -> dict[str, S3Object | None]:
    """Find many objects at once; None: there is no such object.

    Where several lie under one prefix, the prefix is listed, as long as that is fewer requests than to ask for each of them.

    Raises:
        UserError: a bucket is missing or denied, or the store is away.
    """
    found: dict[str, S3Object | None] = dict.fromkeys(uris)
    folders: dict[tuple[str, str], dict[str, str]] = {}  # (bucket, prefix) -> {key: URI}
    for uri in found:
        bucket, key = split_uri(uri, key_needed=True)
        folders.setdefault((bucket, key[: key.rfind("/") + 1]), {})[key] = uri
    rest: list[tuple[str, str, str]] = []  # to be asked for one by one
    for (bucket, prefix), wanted in folders.items():
        store = connect(next(iter(wanted.values())))
        missing = dict(wanted)
        if len(wanted) > FEW:
            try:
                pages = list_pages(store, f"s3://{bucket}/{prefix}", bucket, prefix, "/")
                for n, page in enumerate(pages, 1):
                    found |= {missing.pop(k): S3Object(store, bucket, k, mark) for k, mark in page if k in missing}
                    if not missing or n > len(wanted) // FEW:
                        break
                else:
                    missing = {}  # all of the prefix was seen
            except DeniedError:  # objects may be read where listing is not allowed
                missing = dict(wanted)
        rest += [(bucket, key, uri) for key, uri in missing.items()]
    found.update(ask_for_each(rest))
    return found


def ask_for_each(wanted: list[tuple[str, str, str]]) -> dict[str, S3Object | None]:
    """Find the objects (bucket, key, URI), with a request for each."""

    def ask(item: tuple[str, str, str]) -> S3Object | DeniedError | None:
        bucket, key, uri = item
        store = connect(uri)
        try:
            answer = patiently(uri, lambda: store.client.head_object(Bucket=bucket, Key=key), PATIENCE)
        except NoObjectError:
            return None
        except DeniedError as error:
            return error
        return S3Object(store, bucket, key, mark_of(answer, "ContentLength"))

    with ThreadPoolExecutor(READERS) as pool:
        answers = list(pool.map(ask, wanted))
    open_buckets = {a.bucket for a in answers if isinstance(a, S3Object)}
    found: dict[str, S3Object | None] = {}
    for (bucket, _, uri), answer in zip(wanted, answers, strict=True):
        # To whom listing is not allowed, S3 says of an object that is not there: denied.
        if isinstance(answer, DeniedError) and bucket not in open_buckets:
            raise answer
        found[uri] = answer if isinstance(answer, S3Object) else None
    for bucket, uri in {bucket: uri for bucket, _, uri in wanted if bucket not in open_buckets}.items():
        client = connect(uri).client
        try:  # HEAD has no words for it: perhaps it is the bucket that is not there
            patiently(f"s3://{bucket}", functools.partial(client.head_bucket, Bucket=bucket))
        except DeniedError:
            continue
    return found


# ---- the store -----------------------------------------------------------------------------------------------------------------


def split_uri(uri: str, key_needed: bool = False, what: str = "data") -> tuple[str, str]:
    """Return bucket and key, or prefix, of ``s3://bucket/key``; nothing in it is an escape."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    try:
        uri.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{what} {one_line(printable(uri))}: is no UTF-8, as names in S3 are; check the spelling"
        ) from None
    if not bucket or (key_needed and not key):
        raise UserError(f"{what} {one_line(uri)}: names no {'object' if bucket else 'bucket'}; give s3://bucket/name")
    return bucket, key


def connect(uri: str, what: str = "data") -> Store:
    """Return the connection that the environment describes; ``uri`` and ``what`` are for the message of an error."""
    from botocore.exceptions import BotoCoreError

    try:
        return connect_as(tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith(("AWS_", ANONYMOUS)))))
    except (BotoCoreError, ValueError, OSError) as error:  # no such profile, an endpoint that is no URL, no such file
        raise UserError(
            f"{what} {one_line(uri)}: {one_line(error, 150)}; check the AWS_ variables and ~/.aws"
        ) from None


@functools.lru_cache(maxsize=8)
def connect_as(environment: tuple[tuple[str, str], ...]) -> Store:
    """Make the connection; ``environment`` is what it depends on."""
    import boto3
    import botocore.session
    from botocore import UNSIGNED
    from botocore.config import Config
    from botocore.httpsession import where
    from botocore.utils import get_environ_proxies

    session = botocore.session.get_session()
    config = Config(
        max_pool_connections=2 * READERS,
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        signature_version=UNSIGNED if dict(environment).get(ANONYMOUS) == "1" else "s3v4",
    )
    region = session.get_config_variable("region") or "us-east-1"
    client = boto3.Session(botocore_session=session).client("s3", region_name=region, config=config)
    trusted = session.get_config_variable("ca_bundle") or where()
    tls = ssl.create_default_context(**{"capath" if Path(trusted).is_dir() else "cafile": trusted})
    return Store(client, not get_environ_proxies(client.meta.endpoint_url), tls, {})


def list_pages(
    store: Store, uri: str, bucket: str, prefix: str, delimiter: str = ""
) -> Iterator[list[tuple[str, str]]]:
    """Yield (key, mark) of every object below ``prefix``, by the page; with a delimiter, of those directly below it."""
    token: dict[str, str] = {}
    while True:  # boto3's paginator could not go on after a page that failed
        request = functools.partial(
            store.client.list_objects_v2, Bucket=bucket, Prefix=prefix, Delimiter=delimiter, MaxKeys=PAGE, **token
        )
        # A store that has not answered yet is more likely misspelt than away.
        page = patiently(uri, request, PATIENCE if token else 0.0)
        yield [(found["Key"], mark_of(found, "Size")) for found in page.get("Contents", ())]
        following = page.get("NextContinuationToken")
        if not page.get("IsTruncated") or not following or following == token.get("ContinuationToken"):
            return
        token = {"ContinuationToken": following}


def mark_of(found: dict[str, Any], size: str) -> str:
    return f"{found.get('ETag', '').strip(chr(34))}-{found[size]}"


# ---- trouble -------------------------------------------------------------------------------------------------------------------


class NoObjectError(UserError):
    """There is no such object."""


class DeniedError(UserError):
    """The credentials do not suffice."""


def patiently(
    uri: str, request: Callable[[], T], patience: float = 0.0, unwrapped: tuple[str, ...] = (), what: str = "data"
) -> T:
    """Return what ``request`` does; where the store is away or busy, try again for ``patience`` seconds, with pauses that grow.

    Raises:
        UserError: what went wrong, for the user. botocore's ClientError: S3's code for it is one of ``unwrapped``.
    """
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    until = time.monotonic() + patience
    pause = 0.25
    while True:
        try:
            return request()
        except ClientError as error:
            if code_of(error) in unwrapped:
                raise
            failure: Exception = error
        except (BotoCoreError, Boto3Error, ConnectionError) as error:
            failure = error
        if not is_passing(failure) or time.monotonic() > until:
            refuse(f"{what} {one_line(uri)}", failure)
        time.sleep(random.uniform(pause / 2, pause))  # not all threads at once
        pause = min(2 * pause, LONGEST_PAUSE)


def is_passing(error: Exception) -> bool:
    """Return whether ``error`` may go away by itself."""
    from boto3.exceptions import RetriesExceededError
    from botocore import exceptions

    if isinstance(error, exceptions.ClientError):
        return status_of(error) >= 500 or status_of(error) == 429 or code_of(error) in ("SlowDown", "RequestTimeout")
    if isinstance(error, exceptions.SSLError):
        return False
    passing = (
        exceptions.ConnectionError,
        exceptions.HTTPClientError,
        exceptions.IncompleteReadError,
        exceptions.FlexibleChecksumError,
        RetriesExceededError,
        ConnectionError,
    )
    return isinstance(error, passing)


def refuse(where: str, error: Exception) -> NoReturn:
    """Say in one line what is wrong and what to do."""
    from botocore import exceptions

    key_id = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE)"
    credentials = (
        exceptions.NoCredentialsError,
        exceptions.PartialCredentialsError,
        exceptions.CredentialRetrievalError,
        exceptions.TokenRetrievalError,
        exceptions.SSOError,
    )
    if isinstance(error, exceptions.NoCredentialsError):
        raise UserError(f"{where}: no credentials for S3; set {key_id}, or {ANONYMOUS}=1 for a public bucket")
    if isinstance(error, credentials):
        raise UserError(f"{where}: no credentials for S3 ({one_line(error, 150)}); set {key_id}")
    if isinstance(error, exceptions.ClientError):
        refuse_code(where, code_of(error), status_of(error), error.response.get("Error", {}).get("Message", ""), key_id)
    if isinstance(error, exceptions.ParamValidationError):
        raise UserError(f"{where}: no bucket, or no object, can have such a name; check the name")
    endpoint = one_line(getattr(error, "kwargs", {}).get("endpoint_url", ""), 200).split("?")[0]
    endpoint = "/".join(endpoint.split("/")[:3]) or "S3"
    if isinstance(error, exceptions.SSLError):
        raise UserError(
            f"{where}: the certificate of {endpoint} is not trusted ({one_line(error, 120)}); set AWS_CA_BUNDLE to its authority's file"
        )
    if isinstance(error, (exceptions.ReadTimeoutError, exceptions.ConnectTimeoutError)):
        raise UserError(
            f"{where}: the endpoint {endpoint} does not answer (time-out); check AWS_ENDPOINT_URL and that the server runs"
        )
    if isinstance(error, (exceptions.EndpointConnectionError, exceptions.ProxyConnectionError)):
        raise UserError(
            f"{where}: the endpoint {endpoint} cannot be reached ({reason_of(error)}); check AWS_ENDPOINT_URL and that the server runs"
        )
    if is_passing(error):
        raise UserError(
            f"{where}: the endpoint cuts its answers off, again and again ({one_line(error, 120)}); check the server and the network"
        )
    raise UserError(f"{where}: cannot be read ({one_line(error, 150)}); check the name and the AWS_ variables")


def refuse_code(where: str, code: str, status: int, message: str, key_id: str) -> NoReturn:
    """Say what S3's error ``code`` means for the user."""
    if code == "NoSuchBucket":
        raise UserError(
            f"{where}: no such bucket; check its name, and AWS_ENDPOINT_URL where the store is not Amazon's"
        )
    if code in ("NoSuchKey", "NotFound", "404"):
        kind = "object" if where.count("/") > 2 else "bucket"
        raise NoObjectError(f"{where}: no such {kind}; check the spelling, capitals and small letters too")
    if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired"):
        raise UserError(f"{where}: the store does not accept the credentials ({code}); check {key_id}")
    if code == "RequestTimeTooSkewed":
        raise UserError(f"{where}: this machine's clock differs from the store's; set it right")
    if code in ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"):
        raise UserError(f"{where}: the bucket is in another region; set AWS_DEFAULT_REGION to its region")
    if status in (401, 403):
        raise DeniedError(
            f"{where}: access denied; ask for the right to list the bucket and read its objects, or check {key_id}"
        )
    raise UserError(
        f"{where}: the store answers {status} {one_line(code, 40)} ({one_line(message, 120)}); try again, or see the server's log"
    )


def reason_of(error: BaseException) -> str:
    """Return the system's words for why a connection failed, which botocore buries under its own."""
    cause: BaseException | None = error
    while cause is not None:
        inner = getattr(cause, "kwargs", {}).get("error") if hasattr(cause, "kwargs") else None
        if isinstance(cause, OSError) and cause.strerror:
            return one_line(cause.strerror, 80).lower()
        cause = inner or cause.__cause__ or cause.__context__
    return "connection failed"


def code_of(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def status_of(error: Any) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
