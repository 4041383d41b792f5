#!/bin/sh
# Install Mosquitto, the broker that the tests use, from the system's packages where that is
# allowed; elsewhere say what to install. Tests that need it are skipped without it.
set -eu

if command -v mosquitto >/dev/null 2>&1 || [ -x /usr/sbin/mosquitto ]; then
    exit 0
fi
if command -v apt-get >/dev/null 2>&1; then
    if [ "$(id -u)" = 0 ]; then
        as_root=""
    elif command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then
        as_root="sudo"
    else
        echo "Mosquitto is missing: sudo apt-get install mosquitto (its tests are skipped)" >&2
        exit 0
    fi
    $as_root apt-get update -q >/dev/null
    DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -q --no-install-recommends mosquitto >/dev/null
elif command -v brew >/dev/null 2>&1; then
    brew install mosquitto
else
    echo "Mosquitto is missing: install it from your system's packages (its tests are skipped)" >&2
fi
