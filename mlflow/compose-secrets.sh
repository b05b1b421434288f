#!/bin/sh
# compose-secrets.sh: writes the files of mlflow/secrets that compose.yaml mounts, with random values, where there are none yet.
set -eu
cd "$(dirname "$0")"
# The folder keeps everybody out. Compose mounts each file alone, with the mode that it has here, for users of containers to read.
mkdir -p -m 0700 secrets
umask 022

random() { # LENGTH: letters and digits, which mean nothing to an address or to JSON
  LC_ALL=C tr -dc 'a-zA-Z0-9' </dev/urandom | dd bs="$1" count=1 iflag=fullblock 2>/dev/null
}

keep() { # NAME, its content on standard input
  if [ -e "secrets/$1" ]; then
    cat >/dev/null
  else
    cat >"secrets/$1"
    echo "compose-secrets: wrote mlflow/secrets/$1"
  fi
}

random 32 | keep postgres-password
printf 'postgresql://mlflow:%s@postgres:5432/mlflow\n' "$(cat secrets/postgres-password)" | keep backend-uri
random 24 | keep admin-password
random 64 | keep flask-key
random 20 | keep s3-key
random 40 | keep s3-secret
printf '{"identities": [{"name": "mlflow", "credentials": [{"accessKey": "%s", "secretKey": "%s"}], "actions": ["Admin"]}]}\n' \
  "$(cat secrets/s3-key)" "$(cat secrets/s3-secret)" | keep s3-identities.json
