#!/usr/bin/env bash
# engine.sh start|stop: a container engine for machines that have none running (CI, a bare virtual machine). Both may be said twice.
# Needs root and Debian's package docker.io. The log is in /var/log/graftwork-dockerd.log.
set -euo pipefail

PIDFILE=/run/graftwork-dockerd.pid
LOG=/var/log/graftwork-dockerd.log

answers() { timeout 20 docker version >/dev/null 2>&1; }

# Whether the process that we started is still that: process ids are used again.
ours() { [ -s "$PIDFILE" ] && [ "$(ps -o comm= -p "$(cat "$PIDFILE")" 2>/dev/null)" = dockerd ]; }

start() {
  if answers; then
    echo "engine: answers already"
    return
  fi
  if ! command -v dockerd >/dev/null; then
    echo "engine: no dockerd; install one: apt-get install docker.io" >&2
    exit 2
  fi
  if [ "$(id -u)" != 0 ]; then
    echo "engine: starting it takes root; start your own, or use sudo" >&2
    exit 2
  fi
  # With no terminal and no standard input of ours, so that it outlives the script that asked.
  setsid dockerd --pidfile "$PIDFILE" </dev/null >>"$LOG" 2>&1 &
  for _ in $(seq 60); do
    if answers; then
      echo "engine: started, process $(cat "$PIDFILE")"
      return
    fi
    sleep 0.5
  done
  echo "engine: does not answer within 30 seconds; the end of $LOG:" >&2
  tail -n 5 "$LOG" >&2
  exit 1
}

# The engine that somebody else started is left alone.
stop() {
  if ! ours; then
    echo "engine: none of ours runs"
    return
  fi
  kill "$(cat "$PIDFILE")"
  for _ in $(seq 60); do
    if ! ours; then
      echo "engine: stopped"
      return
    fi
    sleep 0.5
  done
  echo "engine: does not stop within 30 seconds" >&2
  exit 1
}

case "${1:-}" in
  start) start ;;
  stop) stop ;;
  *)
    echo "usage: engine.sh start|stop" >&2
    exit 2
    ;;
esac
