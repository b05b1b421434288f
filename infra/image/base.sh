#!/usr/bin/env bash
# base.sh [NAME]: has the engine hold the base image NAME: as it is, pulled, or, where no registry of images is reached, made
# from Debian's packages by debootstrap (root). What is made is named like what would be pulled, and holds the same suite, not the same bytes.
set -euo pipefail

NAME=${1:-debian:bookworm-20250811-slim}
MIRROR=${MIRROR:-http://deb.debian.org/debian}
SECURITY=${SECURITY:-http://deb.debian.org/debian-security}

if docker image inspect "$NAME" >/dev/null 2>&1; then
  echo "base: $NAME is there"
  exit 0
fi
if timeout 300 docker pull --quiet "$NAME" >/dev/null 2>&1; then
  echo "base: $NAME was pulled"
  exit 0
fi
if ! [[ $NAME =~ ^debian:([a-z]+)(-|$) ]]; then
  echo "base: $NAME cannot be pulled, and only debian:SUITE can be made here" >&2
  exit 2
fi
suite=${BASH_REMATCH[1]}
if ! command -v debootstrap >/dev/null || [ "$(id -u)" != 0 ]; then
  echo "base: $NAME cannot be pulled; to make it, be root and apt-get install debootstrap" >&2
  exit 2
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/root
if ! debootstrap --variant=minbase "$suite" "$root" "$MIRROR" >"$work/log" 2>&1; then
  echo "base: debootstrap failed:" >&2
  tail -n 5 "$work/log" >&2
  exit 1
fi
cat >"$root/etc/apt/sources.list" <<END
deb $MIRROR $suite main
deb $MIRROR $suite-updates main
deb $SECURITY $suite-security main
END
# What the official slim image leaves out as well: manuals, translations and what a package manager can fetch again.
cat >"$root/etc/dpkg/dpkg.cfg.d/slim" <<'END'
path-exclude /usr/share/doc/*
path-include /usr/share/doc/*/copyright
path-exclude /usr/share/man/*
path-exclude /usr/share/info/*
path-exclude /usr/share/locale/*
path-include /usr/share/locale/locale.alias
END
find "$root/usr/share/doc" -type f ! -name copyright -delete
find "$root/usr/share/doc" -type d -empty -delete
find "$root/usr/share/locale" -mindepth 1 -maxdepth 1 ! -name locale.alias -exec rm -rf {} +
rm -rf "$root"/usr/share/{man,info}/* "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/var/log/*
# No service is started by what apt installs while an image is built.
printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
chmod 755 "$root/usr/sbin/policy-rc.d"
tar -C "$root" --numeric-owner -c . | docker import --change 'CMD ["bash"]' - "$NAME" >/dev/null
echo "base: $NAME was made by debootstrap"
