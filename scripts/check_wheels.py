"""Check that a device can install Tunefleet from wheels alone: `python scripts/check_wheels.py`.

Downloads what `.[edge]` with constraints.txt brings to a Linux aarch64 device with glibc 2.28 or
later, for each Python named (default: 3.11 and 3.13, Debian 12's and 13's), and prints how much
that is. Fails where something has no wheel or a package for NVIDIA cards comes along.

pip takes tags of another machine as options, but reads conditions such as `platform_machine ==
"x86_64"` by the machine and the Python that it runs on; so it is run with those of the device.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
TAGS = ["manylinux_2_28_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64"]
CUDA = re.compile(r"(nvidia|cuda|triton)", re.IGNORECASE)
BYTES_PER_MB = 10**6

# Run by Python as another machine's: argv[1] is its version, the rest are pip's arguments.
AS_DEVICE = """
import platform, runpy, sys
version = sys.argv.pop(1)
platform.machine = lambda: "aarch64"
platform.system = lambda: "Linux"
platform.python_version = lambda: version + ".0"
platform.python_version_tuple = lambda: (*version.split("."), "0")
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""


def download(python: str, folder: Path) -> list[Path]:
    """Download everything that a device with this Python installs but Tunefleet itself.

    Raises:
        SystemExit: pip found no set of wheels, and said why.
    """
    wheel_folder = folder / "own"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    own = [*pip, "wheel", "--no-deps", "--wheel-dir", str(wheel_folder), str(REPOSITORY)]
    subprocess.run(own, check=True)
    (wheel,) = wheel_folder.glob("*.whl")
    command = [sys.executable, "-c", AS_DEVICE, python]
    command += ["--disable-pip-version-check", "-qq", "download", "--only-binary", ":all:"]
    command += ["--python-version", python, "--implementation", "cp"]
    command += [part for tag in TAGS for part in ("--platform", tag)]
    command += ["--dest", str(folder), "--constraint", str(REPOSITORY / "constraints.txt")]
    if subprocess.run([*command, f"{wheel}[edge]"], check=False).returncode:
        sys.exit(f"Python {python}: no set of wheels; pip has said why above")
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name != wheel.name)


def main() -> None:
    """Check each Python named, and print what it downloads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", nargs="+", default=["3.11", "3.13"])
    for python in parser.parse_args().python:
        with tempfile.TemporaryDirectory() as folder:
            files = download(python, Path(folder))
            compiled = [path.name for path in files if path.suffix != ".whl"]
            cuda = [path.name for path in files if CUDA.match(path.name)]
            size_mb = sum(path.stat().st_size for path in files) / BYTES_PER_MB
        if compiled or cuda:
            sys.exit(f"Python {python}: not a wheel, or for NVIDIA cards: {compiled + cuda}")
        print(f"Python {python}, Linux aarch64: {len(files)} wheels, {size_mb:.0f} MB, no CUDA")


if __name__ == "__main__":
    main()
