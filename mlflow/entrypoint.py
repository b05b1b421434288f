"""The tracking server's image: ``entrypoint.py serve | migrate | wait | bucket | gc | check``.

    serve    MLflow with accounts, and artifacts through it, on MLFLOW_HOST and MLFLOW_PORT.
    migrate  Make the tables of runs, models and accounts, or upgrade them to this release. Once, before it serves; after a backup.
    wait     Return when the tables are those of this release: what starts beside ``migrate`` must not make them as well.
    gc       Remove for good, with their artifacts, the runs that were deleted longer than GC_OLDER_THAN ago.
    bucket   Make the bucket where there is none.
    check    Tell whether the database and the bucket answer, and change nothing.

All of it is told by environment variables, for a command line can be read by every user of a machine. Each of SECRETS may be given
as NAME_FILE, a file that holds it (a mounted Secret of Kubernetes or of compose). MLflow knows no such files, and learns where the
accounts' database is from a file alone, which is made here. Passwords are taken out of addresses, so that none stands in a log.
"""

import configparser
import os
import re
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

SECRETS = (
    "MLFLOW_BACKEND_STORE_URI",
    "MLFLOW_AUTH_DATABASE_URI",
    "MLFLOW_AUTH_ADMIN_PASSWORD",
    "MLFLOW_FLASK_SERVER_SECRET_KEY",
    "MLFLOW_TRACKING_PASSWORD",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
)
STORES = ("MLFLOW_BACKEND_STORE_URI", "MLFLOW_ARTIFACTS_DESTINATION")
NEEDED = {
    "serve": (
        *STORES,
        "MLFLOW_AUTH_ADMIN_PASSWORD",
        "MLFLOW_FLASK_SERVER_SECRET_KEY",
        "MLFLOW_SERVER_ALLOWED_HOSTS",
    ),
    "wait": ("MLFLOW_BACKEND_STORE_URI",),
    "migrate": ("MLFLOW_BACKEND_STORE_URI",),
    "gc": (*STORES, "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
    "bucket": ("MLFLOW_ARTIFACTS_DESTINATION",),
    "check": STORES,
}
DEFAULTS = {
    "MLFLOW_HOST": "0.0.0.0",
    "MLFLOW_PORT": "5000",
    "MLFLOW_WORKERS": "2",
    "MLFLOW_AUTH_ADMIN_USERNAME": "admin",
    "MLFLOW_AUTH_DEFAULT_PERMISSION": "READ",
    # A password is hashed anew for every request, a third of a second; this long, a worker remembers the answer.
    "MLFLOW_AUTH_CACHE_SECONDS": "60",
    "GC_OLDER_THAN": "30d",
    "WAIT_SECONDS": "600",
    # Three pools a worker, of runs, models and accounts: two replicas of two workers must fit into PostgreSQL's 100 connections.
    "MLFLOW_SQLALCHEMYSTORE_POOL_SIZE": "3",
    "MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW": "3",
    "MLFLOW_SQLALCHEMYSTORE_POOL_RECYCLE": "1800",
    # Job execution judges language models, and costs 2 GB of processes.
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_MODEL_CATALOG_URI": "",
    "GIT_PYTHON_REFRESH": "quiet",
    "AWS_EC2_METADATA_DISABLED": "true",
    # A store that is away must be an answer within seconds: the client asks again, and a worker is not held meanwhile.
    "AWS_MAX_ATTEMPTS": "2",
    "PGCONNECT_TIMEOUT": "5",
    "PGAPPNAME": "mlflow",
}
AUTH_SCHEMA = (
    "auth"  # the accounts' tables, in the same database as MLflow's own, which are in "public": one dump holds both
)
MIGRATION = 7083118  # the number of the lock that migrations take


def main(arguments: list[str]) -> None:
    command = arguments[0] if arguments else "serve"
    if command == "load" and len(arguments) == 1:
        load()
        return
    if command not in NEEDED or len(arguments) > 1:
        fail(f"{' '.join(arguments)}: is no command; give one of {', '.join(NEEDED)}")
    os.umask(0o077)
    os.environ |= {name: value for name, value in DEFAULTS.items() if name not in os.environ}
    os.environ |= secrets_from_files(os.environ)
    missing = [name for name in NEEDED[command] if not os.environ.get(name)]
    if missing:
        fail(f"{command}: {', '.join(missing)} not set; give each, or for a secret NAME_FILE, the file that holds it")
    if command == "bucket":
        make_bucket()
        return
    folder = Path(tempfile.mkdtemp(prefix="tracking-"))
    accounts = keep_passwords_apart(folder)
    os.chdir(folder)
    if command in ("migrate", "wait"):
        {"migrate": migrate, "wait": wait}[command](os.environ["MLFLOW_BACKEND_STORE_URI"], accounts)
    else:
        {"serve": serve, "gc": gc, "check": check}[command]()


def secrets_from_files(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the secrets that NAME_FILE gives, without the line's end that an editor leaves."""
    found = {}
    for name in SECRETS:
        path = environment.get(f"{name}_FILE")
        if not path:
            continue
        if environment.get(name):
            fail(f"{name} and {name}_FILE: both are set; give one of them")
        try:
            found[name] = Path(path).read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "is not UTF-8"
            fail(f"{name}_FILE: {path} cannot be read ({why})")
    return found


def keep_passwords_apart(folder: Path) -> str:
    """Move passwords from the databases' addresses to a file that libpq reads; return the address of the accounts' database."""
    uri = postgres("MLFLOW_BACKEND_STORE_URI", os.environ["MLFLOW_BACKEND_STORE_URI"])
    own = os.environ.pop("MLFLOW_AUTH_DATABASE_URI", "")
    accounts = postgres("MLFLOW_AUTH_DATABASE_URI", own) if own else with_schema(uri, AUTH_SCHEMA)
    lines = dict.fromkeys(line for line in (passfile_line(uri), passfile_line(accounts)) if line)
    if lines:
        (folder / "pgpass").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        os.environ["PGPASSFILE"] = str(folder / "pgpass")
    os.environ["MLFLOW_BACKEND_STORE_URI"] = without_password(uri)
    config = configparser.RawConfigParser()
    config["mlflow"] = {
        "default_permission": os.environ["MLFLOW_AUTH_DEFAULT_PERMISSION"],
        "database_uri": without_password(accounts).replace("%", "%%"),  # MLflow's reader interpolates
        "admin_username": os.environ["MLFLOW_AUTH_ADMIN_USERNAME"].replace("%", "%%"),
        "authorization_function": "mlflow.server.auth:authenticate_request_basic_auth",
        "auth_cache_ttl_seconds": os.environ["MLFLOW_AUTH_CACHE_SECONDS"],
    }
    with (folder / "auth.ini").open("w", encoding="utf-8") as file:
        config.write(file)
    os.environ["MLFLOW_AUTH_CONFIG_PATH"] = str(folder / "auth.ini")
    return without_password(accounts)


def postgres(name: str, uri: str) -> urllib.parse.SplitResult:
    """Return the parts of PostgreSQL's address in the variable ``name``, with the driver that the image has."""
    advice = "give postgresql://USER:PASSWORD@HOST:5432/DATABASE, with '%2F' for a '/' in the password, and so on"
    try:
        parts = urllib.parse.urlsplit(re.sub(r"^postgres(ql)?(\+\w+)?://", "postgresql+psycopg://", uri))
        complete = parts.username and parts.hostname and parts.path.strip("/") and (parts.port or 5432)
    except ValueError:  # a port that is no number: part of a password with a colon or slash in it. It must not be told
        fail(f"{name}: cannot be read; {advice}")
    if parts.scheme != "postgresql+psycopg" or not complete:
        fail(f"{name}: is no complete address of PostgreSQL; {advice}")
    return parts


def with_schema(parts: urllib.parse.SplitResult, schema: str) -> urllib.parse.SplitResult:
    query = [*urllib.parse.parse_qsl(parts.query), ("options", f"-csearch_path={schema}")]
    return parts._replace(query=urllib.parse.urlencode(query, quote_via=urllib.parse.quote))


def without_password(parts: urllib.parse.SplitResult) -> str:
    user, _, host = parts.netloc.rpartition("@")
    return urllib.parse.urlunsplit(parts._replace(netloc=f"{user.partition(':')[0]}@{host}"))


def passfile_line(parts: urllib.parse.SplitResult) -> str:
    """Return libpq's line HOST:PORT:DATABASE:USER:PASSWORD for an address; "" if it has no password."""
    if not parts.password:
        return ""
    words = (parts.hostname, str(parts.port or 5432), parts.path.strip("/"), parts.username, parts.password)
    return ":".join(re.sub(r"([\\:])", r"\\\1", urllib.parse.unquote(str(word))) for word in words)


# ---- commands --------------------------------------------------------------------------------------------------------------------


def serve() -> None:
    """Become MLflow's server. Its workers inherit the environment; no secret is on a command line."""
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--serve-artifacts"]
    os.execv(sys.executable, command)


def migrate(uri: str, accounts: str) -> None:
    """Make the tables, or upgrade them, behind a lock of the database: two at once take turns."""
    from mlflow import db
    from mlflow.server.auth.db import utils as auth
    from sqlalchemy import text

    with engine_of(uri).connect() as lock:
        lock.execute(text(f"SELECT pg_advisory_lock({MIGRATION})"))
        # In this process: the command of that name takes the address as an argument.
        db.commands.main(["upgrade", uri], standalone_mode=False)
        engine = engine_of(accounts)
        with engine.begin() as connection:
            if connection.scalar(text("SELECT current_schema()")) is None:
                connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {AUTH_SCHEMA}"))
        auth.migrate(engine, "head")
    print("migrate: the tables of runs, models and accounts are those of this release")


def wait(uri: str, accounts: str) -> None:
    """Return when both schemas are those of this release; fail after WAIT_SECONDS."""
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory
    from mlflow.server.auth.db import utils as auth
    from mlflow.store.db.utils import _get_latest_schema_revision
    from sqlalchemy.exc import SQLAlchemyError

    wanted = {
        uri: ("alembic_version", _get_latest_schema_revision()),
        accounts: (
            "alembic_version_auth",
            ScriptDirectory.from_config(auth._get_alembic_config(uri)).get_current_head(),
        ),
    }
    why, deadline = "", time.monotonic() + float(os.environ["WAIT_SECONDS"])
    while True:
        try:
            found = {}
            for address, (table, _) in wanted.items():
                with engine_of(address).connect() as connection:
                    context = MigrationContext.configure(connection, opts={"version_table": table})
                    found[address] = (table, context.get_current_revision())
            if found == wanted:
                print("wait: the tables are those of this release")
                return
            said = f"the tables are not those of this release: {', '.join(str(r) for _, r in found.values())}"
        except SQLAlchemyError as error:
            said = f"the database does not answer ({one_line(error)})"
        if time.monotonic() > deadline:
            fail(f"wait: {said}; see what became of 'migrate'")
        if said != why:
            print(f"wait: {said}", flush=True)
            why = said
        time.sleep(2)


def gc() -> None:
    """Remove what was deleted long enough ago; artifacts by way of the server at MLFLOW_TRACKING_URI."""
    from mlflow.cli import gc as collect

    store = ["--backend-store-uri", os.environ["MLFLOW_BACKEND_STORE_URI"]]
    destination = ["--artifacts-destination", os.environ["MLFLOW_ARTIFACTS_DESTINATION"]]
    where = ["--tracking-uri", os.environ["MLFLOW_TRACKING_URI"]]
    collect.main([*store, *destination, *where, "--older-than", os.environ["GC_OLDER_THAN"]], standalone_mode=False)


def check() -> None:
    """Print a line for each of the two stores."""
    from botocore.exceptions import BotoCoreError, ClientError
    from sqlalchemy import text
    from sqlalchemy.exc import SQLAlchemyError

    try:
        with engine_of(os.environ["MLFLOW_BACKEND_STORE_URI"]).connect() as connection:
            print(f"database: PostgreSQL {connection.scalar(text('SHOW server_version'))}")
    except SQLAlchemyError as error:
        fail(f"database: does not answer ({one_line(error)}); see MLFLOW_BACKEND_STORE_URI")
    client, name = s3()
    try:
        client.list_objects_v2(Bucket=name, MaxKeys=1)
    except (BotoCoreError, ClientError) as error:
        fail(f"bucket {name}: does not answer ({one_line(error)}); see MLFLOW_ARTIFACTS_DESTINATION")
    print(f"bucket {name}: answers")


def make_bucket() -> None:
    """Make the bucket of MLFLOW_ARTIFACTS_DESTINATION, unless it is there."""
    from botocore.exceptions import BotoCoreError, ClientError

    client, name = s3()
    try:
        there = name in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]
        if not there:
            client.create_bucket(Bucket=name)
    except (BotoCoreError, ClientError) as error:
        fail(f"bucket {name}: cannot be made ({one_line(error)})")
    print(f"bucket {name}: {'is there' if there else 'was made'}")


def s3() -> tuple[Any, str]:
    """Return (client, bucket) of MLFLOW_ARTIFACTS_DESTINATION."""
    import boto3

    destination = urllib.parse.urlsplit(os.environ["MLFLOW_ARTIFACTS_DESTINATION"])
    if destination.scheme != "s3" or not destination.netloc:
        fail("MLFLOW_ARTIFACTS_DESTINATION: is no address in S3; give s3://BUCKET/PREFIX")
    endpoint = os.environ.get("MLFLOW_S3_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT_URL")
    return boto3.client("s3", endpoint_url=endpoint), destination.netloc


def load() -> None:
    """Load everything that the server loads: while the image is built, which leaves its byte code."""
    import alembic.command
    import boto3
    import graphene
    import mlflow.cli
    import mlflow.server.fastapi_app
    import mlflow.server.graphql.graphql_schema_extensions
    import mlflow.store.model_registry.sqlalchemy_store
    import mlflow.store.tracking.sqlalchemy_store
    import psycopg
    import uvicorn

    boto3.client("s3", region_name="us-east-1")
    print(alembic.__name__, graphene.__name__, uvicorn.__name__, psycopg.pq.__impl__, mlflow.__version__)


def engine_of(uri: str) -> Any:
    import sqlalchemy

    return sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def fail(message: str) -> NoReturn:
    print(f"tracking server: error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
