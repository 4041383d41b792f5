#!/bin/sh
# Build a Debian package of the aggregator, or of the device's client:
#
#   deploy/deb/build.sh aggregator|edge-client [FOLDER]
#
# It has this system's Python version and architecture, and everything that it needs from wheels, in
# /usr/lib/tunefleet-NAME; so it is built on the release that it is to run on. FOLDER (default
# dist) gets tunefleet-NAME_VERSION_ARCHITECTURE.deb. Needs python3-venv and dpkg-dev's dpkg-deb; not root.
set -eu

repository=$(cd "$(dirname "$0")/../.." && pwd)
name=${1:-}
case $name in
aggregator) extra=dashboard module=aggregator ;;
edge-client) extra=edge module=edge_client ;;
*)
    echo "say which: $0 aggregator|edge-client [FOLDER]" >&2
    exit 2
    ;;
esac
mkdir -p "${2:-dist}"
out=$(cd "${2:-dist}" && pwd)
python=/usr/bin/python3
package=tunefleet-$name
home=/usr/lib/$package

for tool in dpkg-deb dpkg; do
    command -v $tool >/dev/null || { echo "$tool is missing: this needs Debian or Ubuntu" >&2; exit 1; }
done
$python -c 'import ensurepip' 2>/dev/null || { echo "install python3-venv" >&2; exit 1; }
minor=$($python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
next=$($python -c 'import sys; print("%d.%d" % (sys.version_info[0], sys.version_info[1] + 1))')
architecture=$(dpkg --print-architecture)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tree=$work/tree

# An environment whose interpreter is the system's, so that it may lie anywhere.
$python -m venv "$work/pip"
site=$tree$home/lib/python$minor/site-packages
mkdir -p "$site" "$tree$home/bin" "$tree/usr/bin" "$tree/DEBIAN" "$tree/usr/share/doc/$package"
pip="$work/pip/bin/python -m pip --disable-pip-version-check"
$pip wheel --quiet --no-deps --wheel-dir "$work" "$repository"
wheel=$(ls "$work"/tunefleet-*.whl)
version=$(basename "$wheel" | cut -d- -f2)
# PyTorch comes from the index that TORCH_INDEX names, if it does; see README.
$pip install --quiet --only-binary :all: --target "$site" --constraint "$repository/constraints.txt" \
    ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$wheel[$extra]"
rm -rf "$site/bin"
ln -s "/usr/bin/python$minor" "$tree$home/bin/python"
printf 'home = /usr/bin\ninclude-system-site-packages = false\nversion = %s\n' "$minor" >"$tree$home/pyvenv.cfg"
# Compiled now: who runs it may not write there. What is only for tests of libraries may not compile.
$python -m compileall -q -j 0 -s "$tree" "$site" >/dev/null || true

cat >"$tree/usr/bin/$name" <<END
#!/bin/sh
exec $home/bin/python -m $module "\$@"
END
chmod 755 "$tree/usr/bin/$name"
cp "$repository/LICENSE" "$tree/usr/share/doc/$package/copyright"

recommends=
if [ "$name" = aggregator ]; then
    recommends="Recommends: mosquitto"
    mkdir -p "$tree/usr/lib/sysusers.d"
    echo 'u tunefleet - "Tunefleet aggregator" /var/lib/tunefleet' >"$tree/usr/lib/sysusers.d/$package.conf"
    cat >"$tree/DEBIAN/postinst" <<'END'
#!/bin/sh
set -e
if [ "$1" = configure ]; then
    systemd-sysusers tunefleet-aggregator.conf
    mkdir -p /var/lib/tunefleet
    chown tunefleet:tunefleet /var/lib/tunefleet
    chmod 700 /var/lib/tunefleet
fi
END
    chmod 755 "$tree/DEBIAN/postinst"
fi
{
    cat <<END
Package: $package
Version: $version
Architecture: $architecture
Maintainer: Tunefleet <tunefleet@localhost>
Section: science
Priority: optional
Depends: python3 (>= $minor), python3 (<< $next)$([ "$name" = aggregator ] && printf ', systemd')
${recommends:-Recommends: libgomp1}
Installed-Size: $(du -sk "$tree" | cut -f1)
Description: federated LoRA fine-tuning of small language models ($name)
 Devices fine-tune a small language model on their own text and send what they
 have learned; an aggregator merges it. This is the $name.
END
} >"$tree/DEBIAN/control"
chmod -R u+rwX,go+rX,go-w "$tree"
dpkg-deb --root-owner-group -Zxz --build "$tree" "$out/${package}_${version}_${architecture}.deb" >/dev/null
echo "$out/${package}_${version}_${architecture}.deb"
