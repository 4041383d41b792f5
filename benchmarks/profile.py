"""Time `edge-client profile` as a person does: the whole command, from start to end.

    python -m benchmarks.profile [--times 21] [--quick]

Prints the median wall time with the processor's beside it: on a machine that does other work too
the first grows, and the second little.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

from benchmarks.claims import Claim, write_claims

TARGET_S = 0.5


def measure(arguments: list[str], times: int) -> tuple[list[float], list[float]]:
    """Run a command so many times; return wall and processor seconds of each, sorted."""
    walls_s, processor_s = [], []
    for _ in range(times):
        before, began = os.times(), time.monotonic()
        subprocess.run(
            [sys.executable, "-m", "edge_client", *arguments],
            stdout=subprocess.DEVNULL,
            check=True,
        )
        walls_s.append(time.monotonic() - began)
        after = os.times()
        processor_s.append(
            after.children_user
            + after.children_system
            - before.children_user
            - before.children_system
        )
    return sorted(walls_s), sorted(processor_s)


def main() -> None:
    """Measure both forms and write the claims."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=21)
    parser.add_argument("--quick", action="store_true", help="three times each")
    options = parser.parse_args()
    times = min(3, options.times) if options.quick else options.times
    claims: list[Claim] = []
    details: dict[str, object] = {"load": os.getloadavg()[0], "cores": os.cpu_count()}
    for arguments in (["profile"], ["profile", "--json"]):
        walls_s, processor_s = measure(arguments, times)
        name = f"edge-client {' '.join(arguments)}"
        median_s = statistics.median(walls_s)
        claims.append(
            Claim(f"{name}, median s", median_s, f"< {TARGET_S}", met=median_s < TARGET_S)
        )
        details[name] = {"wall_s": walls_s, "processor_s": processor_s}
        print(
            f"{name}: wall {walls_s[0]:.2f} to {walls_s[-1]:.2f} s, median {median_s:.2f}; "
            f"processor, median {statistics.median(processor_s):.2f} s; "
            f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
        )
    write_claims("profile", claims, **details)


if __name__ == "__main__":
    main()
