#!/bin/sh
# Get what tests of the live page and of its metrics drive: Chromium, from the system's packages where
# that is allowed, and promtool, into the virtual environment named by $1. Nothing is started. Tests
# that need either are skipped without it.
set -eu
venv="${1:-.venv}"

if ! command -v apt-get >/dev/null 2>&1; then
    command -v chromium >/dev/null 2>&1 || echo "Chromium is missing: tests of the live page are skipped" >&2
    command -v promtool >/dev/null 2>&1 || echo "promtool is missing: a test of metrics is skipped" >&2
    exit 0
fi

if ! command -v chromium >/dev/null 2>&1; then
    if [ "$(id -u)" = 0 ]; then
        as_root=""
    elif command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then
        as_root="sudo"
    else
        as_root="none"
        echo "Chromium is missing: sudo apt-get install chromium (its tests are skipped)" >&2
    fi
    if [ "$as_root" != none ]; then
        $as_root apt-get update -q >/dev/null
        DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -q --no-install-recommends chromium >/dev/null ||
            echo "Chromium can't be installed: its tests are skipped" >&2
    fi
fi

# Installed as a package it would start a server; the tests want one program of it.
if ! command -v promtool >/dev/null 2>&1 && [ ! -x "$venv/bin/promtool" ]; then
    place="$(mktemp -d)"
    trap 'rm -rf "$place"' EXIT
    if (cd "$place" && apt-get download -q prometheus >/dev/null 2>&1 && dpkg-deb -x prometheus_*.deb tree); then
        cp "$place/tree/usr/bin/promtool" "$venv/bin/promtool"
    else
        echo "promtool can't be fetched: a test of metrics is skipped" >&2
    fi
fi
