#!/bin/sh
# restore.sh FOLDER/TIME [--replace]: puts back what backup.sh saved. Stop the server first, and run `migrate` after it.
set -eu
exec "${PYTHON:-python3}" "$(dirname "$0")/backup.py" restore "$@"
