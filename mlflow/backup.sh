#!/bin/sh
# backup.sh FOLDER: saves the tracking server's database and objects as FOLDER/TIME, while it serves. docs/tracking-server.md tells more.
set -eu
exec "${PYTHON:-python3}" "$(dirname "$0")/backup.py" backup "$@"
