"""Backup and restore of the tracking server: its database by pg_dump, its objects by content. See backup.sh and restore.sh.

A backup is FOLDER/NAME/database.dump and FOLDER/NAME/objects.json, which says the content of each object; the contents are in
FOLDER/objects, named by their SHA-256, each once for all backups. The database is saved first: the objects that it names are older
than it, so that they are all in the backup. What an object held is fetched again only if the store says that it has changed.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import entrypoint
from entrypoint import fail, one_line

USAGE = """usage: backup.sh FOLDER                        make FOLDER/TIME
       restore.sh FOLDER/TIME [--replace]     put a backup into an empty database, or with --replace into one that is not

MLFLOW_BACKEND_STORE_URI, MLFLOW_ARTIFACTS_DESTINATION and AWS_... say where, as for the server (NAME_FILE too, docs/tracking-server.md).
Wanted: pg_dump and pg_restore no older than the server, and a python3 ($PYTHON) with boto3 and what mlflow/requirements.txt has."""


def main(arguments: list[str]) -> None:
    what, *rest = arguments or [""]
    replace = "--replace" in rest
    rest = [word for word in rest if word != "--replace"]
    if what not in ("backup", "restore") or len(rest) != 1 or rest[0].startswith("-"):
        print(USAGE, file=sys.stderr)
        sys.exit(2)
    os.umask(0o077)
    os.environ |= {name: value for name, value in entrypoint.DEFAULTS.items() if name not in os.environ}
    os.environ |= entrypoint.secrets_from_files(os.environ)
    missing = [name for name in entrypoint.STORES if not os.environ.get(name)]
    if missing:
        fail(f"{what}: {', '.join(missing)} not set; give what the server has")
    program = {"backup": "pg_dump", "restore": "pg_restore"}[what]
    if not shutil.which(program):
        fail(f"{what}: no {program} on the PATH; apt-get install postgresql-client")
    with tempfile.TemporaryDirectory(prefix="tracking-") as temporary:
        entrypoint.keep_passwords_apart(Path(temporary))  # and with PGPASSFILE, from every command line below
        uri = os.environ["MLFLOW_BACKEND_STORE_URI"].replace("postgresql+psycopg://", "postgresql://")
        if what == "backup":
            backup(uri, Path(rest[0]))
        else:
            restore(uri, Path(rest[0]), replace)


def backup(uri: str, folder: Path) -> None:
    name = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    partial, final = folder / f"{name}.partial", folder / name
    partial.mkdir(parents=True)
    postgres("pg_dump", "--format=custom", "--no-owner", f"--file={partial / 'database.dump'}", f"--dbname={uri}")
    found, fetched = save_objects(folder / "objects", last_index(folder))
    (partial / "objects.json").write_text(json.dumps(found, indent=0), encoding="utf-8")
    partial.rename(final)
    size = (final / "database.dump").stat().st_size
    print(f"backup: {final}: database {size / 1e6:.1f} MB, {len(found)} objects, {fetched} of them new")


def restore(uri: str, folder: Path, replace: bool) -> None:
    dump, index = folder / "database.dump", folder / "objects.json"
    if not dump.is_file() or not index.is_file():
        fail(f"restore: {folder} is no backup; give FOLDER/TIME")
    wanted = json.loads(index.read_text(encoding="utf-8"))
    damaged = [key for key, told in wanted.items() if not is_sound(folder.parent / "objects", told["sha256"])]
    if damaged:  # found before anything is changed
        fail(f"restore: {len(damaged)} objects are missing or damaged in the backup, the first {damaged[0]!r}")
    if not replace and tables(uri):
        fail("restore: the database has tables already; give an empty one, or --replace, which drops what is in it")
    # The objects first: the database, in one transaction, is what makes them visible.
    stored = load_objects(folder.parent / "objects", wanted)
    clean = ["--clean", "--if-exists"] if replace else []
    postgres(
        "pg_restore", "--no-owner", "--single-transaction", "--exit-on-error", *clean, f"--dbname={uri}", str(dump)
    )
    print(f"restore: {folder}: database, and {stored} of {len(wanted)} objects that were not there")


# ---- the database ----------------------------------------------------------------------------------------------------------------


def postgres(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        fail(f"{command[0]}: {' '.join(done.stderr.split())[:300]}")


def tables(uri: str) -> int:
    from sqlalchemy import text

    schemas = f"'public', '{entrypoint.AUTH_SCHEMA}'"
    with entrypoint.engine_of(uri.replace("postgresql://", "postgresql+psycopg://")).connect() as connection:
        return int(connection.scalar(text(f"SELECT count(*) FROM pg_tables WHERE schemaname IN ({schemas})")))


# ---- objects ---------------------------------------------------------------------------------------------------------------------


def store() -> tuple[Any, str, str]:
    """Return (client, bucket, prefix) of MLFLOW_ARTIFACTS_DESTINATION."""
    client, bucket = entrypoint.s3()
    prefix = urllib.parse.urlsplit(os.environ["MLFLOW_ARTIFACTS_DESTINATION"]).path.strip("/")
    return client, bucket, f"{prefix}/" if prefix else ""


def listed(client: Any, bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        yield from page.get("Contents", [])


def save_objects(folder: Path, known: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Copy what is new; return ({key under the prefix: {"sha256", "size", "etag"}}, how many were fetched)."""
    from botocore.exceptions import BotoCoreError, ClientError

    folder.mkdir(parents=True, exist_ok=True)
    client, bucket, prefix = store()
    found, fetched = {}, 0
    try:
        for entry in listed(client, bucket, prefix):
            key, told = entry["Key"][len(prefix) :], {"size": entry["Size"], "etag": entry["ETag"]}
            before = known.get(key, {})
            sha256 = before.get("sha256", "") if all(before.get(name) == told[name] for name in told) else ""
            if not sha256 or not place_of(folder, sha256).exists():
                sha256, fetched = fetch(client, bucket, entry["Key"], folder), fetched + 1
            found[key] = {"sha256": sha256, **told}
    except (BotoCoreError, ClientError) as error:
        fail(f"bucket {bucket}: {one_line(error)}")
    return found, fetched


def fetch(client: Any, bucket: str, key: str, folder: Path) -> str:
    partial = folder / "partial"
    with partial.open("wb") as file:
        client.download_fileobj(bucket, key, file)
    sha256 = digest(partial)
    place_of(folder, sha256).parent.mkdir(exist_ok=True)
    partial.replace(place_of(folder, sha256))
    return sha256


def load_objects(folder: Path, wanted: dict[str, Any]) -> int:
    """Put what the bucket does not have as it was; return how many. What it has besides is left."""
    from botocore.exceptions import BotoCoreError, ClientError

    client, bucket, prefix = store()
    stored = 0
    try:
        if bucket not in [b["Name"] for b in client.list_buckets()["Buckets"]]:
            client.create_bucket(Bucket=bucket)
        there = {entry["Key"]: entry for entry in listed(client, bucket, prefix)}
        for key, told in wanted.items():
            entry = there.get(prefix + key, {})
            if (entry.get("Size"), entry.get("ETag")) != (told["size"], told["etag"]):
                client.upload_file(str(place_of(folder, told["sha256"])), bucket, prefix + key)
                stored += 1
    except (BotoCoreError, ClientError) as error:
        fail(f"bucket {bucket}: {one_line(error)}")
    return stored


def last_index(folder: Path) -> dict[str, Any]:
    """Return the newest backup's index of objects; {} if there is none."""
    found = sorted(folder.glob("*[0-9]/objects.json"))
    return dict(json.loads(found[-1].read_text(encoding="utf-8"))) if found else {}


def place_of(folder: Path, sha256: str) -> Path:
    return folder / sha256[:2] / sha256


def is_sound(folder: Path, sha256: str) -> bool:
    path = place_of(folder, sha256)
    return path.is_file() and digest(path) == sha256


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main(sys.argv[1:])
