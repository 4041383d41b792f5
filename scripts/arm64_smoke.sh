#!/bin/bash
# Follow README's "On a Raspberry Pi" word for word in an emulated arm64 Debian, up to one real
# round, with a broker and an aggregator outside it; print sizes and the result.
#
#   sudo scripts/arm64_smoke.sh [FOLDER [SUITE [MIRROR]]]
#
# FOLDER (default /var/tmp/tunefleet-arm64) keeps the Debian for the next run; SUITE (default
# bookworm) is its release; MIRROR is debootstrap's default unless given. Needs root, x86-64 Debian
# or Ubuntu with qemu-user-static, debootstrap and mosquitto, and the host's own environment (`make
# .venv`; another one's commands: BIN=FOLDER). Uses the host's pip configuration, certificates and
# proxies. Emulation does floating point in software, thousands of times slower than this computer:
# so the job's sequences are short and few. REUSE=1 keeps the last run's .venv, and only adds what is
# new; NICE=0 gives it as much of the processor as anything else.
set -euo pipefail

repository=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-/var/tmp/tunefleet-arm64}
suite=${2:-bookworm}
mirror=${3:-}
bin=${BIN:-$repository/.venv/bin}
root=$folder/$suite
home=$root/root/tunefleet
# broker.example of README, in the emulated machine's /etc/hosts.
address=127.0.0.2
round_limit_s=14400
most_mib=1144 # 1.2 GB
started=()

say() { printf '== %s\n' "$*"; }
fail() { printf 'FAILED: %s\n' "$*" >&2; exit 1; }

clean_up() {
    for pid in "${started[@]}"; do kill "$pid" 2>/dev/null || true; done
    wait
    for place in dev/shm sys proc; do
        if mountpoint -q "$root/$place"; then umount --lazy "$root/$place"; fi
    done
}

check_host() {
    [ "$(id -u)" = 0 ] || fail "needs root, for chroot and binfmt_misc"
    local tool
    for tool in qemu-aarch64-static debootstrap mosquitto mountpoint; do
        command -v "$tool" >/dev/null || fail "$tool is missing: apt-get install it"
    done
    [ -x "$bin/aggregator" ] || fail "$bin/aggregator is missing: make .venv, or set BIN"
}

# Flag F opens the emulator now, so that it is found from inside the chroot.
register_emulator() {
    local registry=/proc/sys/fs/binfmt_misc
    [ -e "$registry/register" ] || mount -t binfmt_misc binfmt_misc "$registry"
    [ -e "$registry/qemu-aarch64" ] && return
    local magic='\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00'
    local mask='\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff'
    echo ":qemu-aarch64:M::$magic:$mask:$(command -v qemu-aarch64-static):F" >"$registry/register"
}

make_debian() {
    if [ ! -e "$root/etc/complete" ]; then
        say "an arm64 Debian $suite in $root"
        rm -rf "$root"
        mkdir -p "$root"
        debootstrap --arch=arm64 --foreign --variant=minbase --include=ca-certificates,sudo \
            "$suite" "$root" ${mirror:+"$mirror"} >"$folder/debootstrap.log" 2>&1 ||
            fail "debootstrap: see $folder/debootstrap.log"
        chroot "$root" /debootstrap/debootstrap --second-stage >>"$folder/debootstrap.log" 2>&1 ||
            fail "debootstrap's second stage: see $folder/debootstrap.log"
        touch "$root/etc/complete"
    fi
    mount -t proc proc "$root/proc"
    mount -t sysfs -o ro sys "$root/sys"
    mkdir -p "$root/dev/shm"
    mount -t tmpfs tmpfs "$root/dev/shm"
}

# The emulated machine reaches the network as the host does.
share_network() {
    cp -L /etc/resolv.conf "$root/etc/resolv.conf"
    { cat /etc/hosts; echo "$address broker.example"; } >"$root/etc/hosts"
    local file
    for file in /etc/pip.conf /root/.config/pip/pip.conf /root/.pip/pip.conf \
        /etc/ssl/certs/ca-certificates.crt; do
        if [ -f "$file" ]; then install -D -m 644 "$file" "$root$file"; fi
    done
}

copy_repository() {
    if [ -d "$home" ]; then
        if [ -n "${REUSE:-}" ]; then rm -rf "$folder/.venv" && mv "$home/.venv" "$folder/"; fi
        rm -rf "$home"
    fi
    mkdir -p "$home/notes"
    if [ -d "$folder/.venv" ]; then mv "$folder/.venv" "$home/"; fi
    git -C "$repository" -c safe.directory="$repository" ls-files -z |
        tar -C "$repository" --null --files-from=- -cf - | tar -C "$home" -xf -
    head -c 2000 "$repository/docs/privacy.md" >"$home/notes/notes.md" # evaluating it is slow here
}

# README's blocks of commands under the heading, one file each.
extract_commands() {
    rm -f "$folder"/readme-*.sh
    awk -v folder="$folder" '
        /^#/ && !inside { part = ($0 == "### On a Raspberry Pi"); next }
        part && /^```sh$/ { inside = 1; file = sprintf("%s/readme-%d.sh", folder, ++blocks); next }
        /^```$/ { inside = 0; next }
        part && inside { print > file }' "$repository/README.md"
    grep -q 'pip install' "$folder/readme-1.sh" && grep -q 'edge-client run' "$folder/readme-2.sh" ||
        fail "README's part on the Raspberry Pi has changed its shape: mend this script"
}

# Run a file of commands on the emulated machine, each shown first. Only wheels: pip refuses to
# install what it would have to compile, but for this package itself, which is not from an index.
emulated() {
    env -i HOME=/root LANG=C.UTF-8 TERM=dumb PATH=/usr/sbin:/usr/bin:/sbin:/bin \
        DEBIAN_FRONTEND=noninteractive PIP_ONLY_BINARY=:all: PIP_PROGRESS_BAR=off \
        PYTHONUNBUFFERED=1 $(host_settings) \
        nice -n ${NICE:-15} chroot "$root" /bin/bash -c 'cd && cd tunefleet && set -ex && . /dev/stdin' <"$1"
}

# NAME=VALUE of the host's settings for pip, proxies and certificates (no blanks in them).
host_settings() {
    env | grep -iE '^(PIP_[A-Z_]+|https?_proxy|no_proxy|SSL_CERT_FILE|REQUESTS_CA_BUNDLE)=' |
        grep -viE '^PIP_(ONLY_BINARY|PROGRESS_BAR)=' || true
}

# Sizes as pip prints them ("Downloading NAME.whl (140.0 MB)"), in MB.
download_mb() {
    sed -nE 's/.*(Downloading|Using cached) .*\.whl.*\(([0-9.]+) ([kM]B|bytes)\).*/\2 \3/p' "$1" |
        awk '{ mb += $1 * ($2 == "MB" ? 1 : $2 == "kB" ? 1e-3 : 1e-6) } END { printf "%.0f", mb }'
}

install_on_device() {
    say "README, first block"
    local since=$SECONDS
    emulated "$folder/readme-1.sh" 2>&1 | tee "$folder/install.log"
    install_s=$((SECONDS - since))
    download="$(download_mb "$folder/install.log") MB${REUSE:+ beyond the last run\'s}"
    # In MiB: what README's commands put into .venv.
    installed=$(du -sm "$home/.venv" | cut -f1)
    packages=$(ls "$home"/.venv/lib/python3.*/site-packages)
    if grep -iE '^(nvidia|cuda|triton)' <<<"$packages"; then fail "CUDA packages came along"; fi
    if grep -E 'Building wheel for' "$folder/install.log" | grep -v tunefleet; then
        fail "something was compiled"
    fi
    [ "$installed" -le "$most_mib" ] || fail "installed: $installed MiB, more than $most_mib"
}

# What is there of the commands that README does not show.
try_commands() {
    local listed name
    echo '.venv/bin/edge-client --help' >"$folder/help.sh"
    listed=$(emulated "$folder/help.sh" 2>/dev/null)
    tried=""
    for name in plan doctor; do
        if grep -q "edge-client $name" "$folder"/readme-*.sh; then continue; fi
        if ! grep -qE "^[^a-z]*$name " <<<"$listed"; then
            tried+=" $name: not there, skipped;"
            continue
        fi
        say "edge-client $name"
        case $name in
            plan) echo '.venv/bin/edge-client plan --explain --job job.toml' ;;
            doctor) echo ".venv/bin/edge-client doctor --data notes/ --broker $1" ;;
        esac >"$folder/$name.sh"
        if emulated "$folder/$name.sh"; then tried+=" $name: done;"; else tried+=" $name: FAILED;"; fi
    done
}

serve() {
    cat >"$folder/mosquitto.conf" <<-CONF
	listener 1883 $address
	allow_anonymous true
	max_packet_size 2097152
	CONF
    mosquitto -c "$folder/mosquitto.conf" >"$folder/mosquitto.log" 2>&1 &
    started+=($!)
    cat >"$folder/job.toml" <<-JOB
	job = "smoke"
	model = "base-tiny"
	rounds = 1
	[training]
	steps = 2
	tokens_per_step = 32
	max_tokens = 32
	[policy]
	min_devices = 1
	quorum = 1
	deadline_s = $round_limit_s
	JOB
    cp "$folder/job.toml" "$home/"
    rm -rf "$folder/aggregator" "$root/root/.local/share/tunefleet"
    "$bin/aggregator" serve "$folder/job.toml" --broker "mqtt://$address:1883" --exit-when-done \
        --state "$folder/aggregator" --key "$folder/aggregator.key" >"$folder/aggregator.log" 2>&1 &
    aggregator=$!
    started+=("$aggregator")
}

one_round() {
    say "README, second block: one round of base-tiny"
    local since=$SECONDS
    emulated "$folder/readme-2.sh" >"$folder/device.log" 2>&1 &
    local device=$!
    started+=("$device")
    while kill -0 "$aggregator" 2>/dev/null; do
        kill -0 "$device" 2>/dev/null || { cat "$folder/device.log"; fail "the device has ended"; }
        [ $((SECONDS - since)) -lt "$round_limit_s" ] || fail "no round in $round_limit_s s"
        sleep 5
    done
    wait "$aggregator" || { cat "$folder/aggregator.log"; fail "the aggregator has failed"; }
    round_s=$((SECONDS - since))
    cat "$folder/device.log" "$folder/aggregator.log"
}

check_host
trap clean_up EXIT
register_emulator
mkdir -p "$folder"
make_debian
share_network
copy_repository
extract_commands
install_on_device
serve
try_commands "mqtt://broker.example:1883"
one_round
say "Debian $suite, $(chroot "$root" python3 --version), $(chroot "$root" uname -m)"
say "downloaded: $download; .venv: $installed MiB (at most $most_mib); no CUDA, nothing compiled"
say "install: $install_s s; the round, with measuring: $round_s s (both emulated)"
say "other commands:${tried:- in README}"
say "passed"
