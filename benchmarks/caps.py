"""Train under hard memory caps: `python -m benchmarks.caps [--quick]`.

For each of ten budgets from 600 MiB to 4 GiB a fleet of one: a real aggregator with its embedded
broker, and a real `edge-client run` on a 15M- or SmolLM2-135M-shaped model with random weights. The
whole client is in a memory cgroup with that limit where one may be made; elsewhere it is told
--memory-cap, which its watchdog holds training to. Every budget measures its constants anew,
within it. Budgets that are done are kept in runs/bench/caps, for the code as it is, and a run that
was stopped goes on after them (--fresh: all anew). Writes runs/bench/caps.json.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.claims import FOLDER, Claim, write_claims
from benchmarks.made_models import SHAPES, make_model
from benchmarks.memory_cases import write_text
from benchmarks.memory_plan import code_hash
from device_profiles.processes import Event, Processes
from edge_client.plan import micro_batches
from protocol.messages import Training

BUDGETS_MIB = (600, 4096, 1300, 800, 2000, 1000, 3200, 700, 1600, 2500)
"""The first say most."""
QUICK = 3
USED = 0.70
ROOT = Path("/sys/fs/cgroup/memory")
TIMEOUT_S = 7200
LADDER = [2, 4, 8, 16, 32, 64]


@contextmanager
def memory_group(limit_mib: int) -> Iterator[Path | None]:
    """Make a memory cgroup (v1) with a hard limit; None where that is not permitted."""
    group = ROOT / f"tunefleet-caps-{os.getpid()}-{limit_mib}"
    try:
        group.mkdir()
    except OSError:
        yield None
        return
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit_mib << 20))
        yield group
    finally:
        while group.exists():  # a process that is about to end may still be in it
            with suppress(OSError):
                group.rmdir()


def kills(group: Path | None) -> int:
    """Return how many processes the kernel has ended in a group for want of memory."""
    if group is None:
        return 0
    found = dict(line.split() for line in (group / "memory.oom_control").read_text().splitlines())
    return int(found.get("oom_kill", 0))


def one(budget_mib: int, model: Path, training: dict[str, int], text: Path) -> dict[str, Any]:
    """Run a job of one round under a budget; return what came of it."""
    job = {
        "job": "caps",
        "model": str(model),
        "rounds": 1,
        "ladder": LADDER,
        "training": training,
        "policy": {"min_devices": 1, "quorum": 1},
    }
    with tempfile.TemporaryDirectory() as name, memory_group(budget_mib) as group:
        folder = Path(name)
        (folder / "job.json").write_text(json.dumps(job))
        run: list[object] = ["run", "--json", "--exit-when-done", "--name", "capped"]
        run += ["--data", text, "--model", model, "--threads", 1]
        run += ["--cache", folder / "cache", "--state", folder / "capped"]
        if group is None:
            run += ["--memory-cap", budget_mib]
        serve = ["serve", folder / "job.json", "--state", folder / "server", "--json"]
        seen: list[Event] = []
        with Processes(folder / "events.jsonl", folder) as processes:
            processes.start("aggregator", "aggregator", serve)
            for event in processes.events(TIMEOUT_S):
                seen.append(event)
                if event["event"] == "serving":
                    processes.start("capped", "edge_client", [*run, "--broker", event["broker"]])
                    if group is not None:
                        (group / "cgroup.procs").write_text(str(processes.pid("capped")))
                if event["event"] == "finished":
                    break
        by = {event["event"]: event for event in seen}
        plan, end = by["plan"], by["finished"]
        peak_mib = end["floor_mib"] + end["peak_mib"]
        return {
            "budget_mib": budget_mib,
            "cap": "cgroup" if group else "watchdog",
            "plan": plan["plan"],
            "predicted_mib": end["floor_mib"] + plan["predicted_mib"],
            "peak_mib": peak_mib,
            "used": peak_mib / budget_mib,
            "larger": is_larger_left(plan, training),
            "stepped_down": sum(event["event"] == "stepped-down" for event in seen),
            "killed": kills(group),
            "merged": sum(event["event"] == "merged" for event in seen),
        }


def is_larger_left(plan: Event, training: dict[str, int]) -> bool:
    """Say whether there is a plan that would take more than this one, and be better."""
    most = micro_batches(Training.model_validate(training), training["max_tokens"])[-1]
    largest = (LADDER[-1], LADDER[-1], training["max_tokens"], most, False)
    names = ("rank", "held", "seq_len", "micro_batch", "checkpointing")
    return tuple(plan[name] for name in names) != largest


def claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """Return what was claimed of every budget that was run."""
    ended = sum(row["killed"] + row["stepped_down"] for row in rows)
    merged = sum(row["merged"] > 0 for row in rows)
    shares = [row["used"] for row in rows if row["larger"]]
    least, most = min(shares, default=1.0), max(row["used"] for row in rows)
    return [
        Claim("budgets", len(rows), "10", len(rows) == len(BUDGETS_MIB)),
        Claim("of them with a finished round", merged, "all", merged == len(rows)),
        Claim("training processes killed", ended, "0", ended == 0),
        Claim("peak / budget, largest", most, "≤ 1", most <= 1),
        Claim("peak / budget where a larger plan exists, least", least, f"≥ {USED}", least >= USED),
    ]


def main() -> None:
    """Run the budgets, print a line for each, write the claims."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=f"the first {QUICK} budgets only")
    parser.add_argument("--fresh", action="store_true", help="forget what was run before")
    parser.add_argument("--model", choices=sorted(SHAPES), default="15M")
    parser.add_argument("--steps", type=int, default=2, help="steps of the round (default 2)")
    parser.add_argument(
        "--tokens", type=int, default=32768, help="tokens of a step (default 32768)"
    )
    options = parser.parse_args()
    training = {"steps": options.steps, "tokens_per_step": options.tokens, "max_tokens": 256}
    kept = FOLDER / "caps" / f"{code_hash()}-{options.model}-{options.steps}x{options.tokens}.json"
    if options.fresh:
        kept.unlink(missing_ok=True)
    kept.parent.mkdir(parents=True, exist_ok=True)
    done = json.loads(kept.read_text()) if kept.exists() else {}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(options.model, Path(folder))
        text = write_text(Path(folder), 4, training["max_tokens"])
        print(f"{'budget':>6} predicted   peak   used  plan")
        for budget_mib in BUDGETS_MIB[:QUICK] if options.quick else BUDGETS_MIB:
            key = str(budget_mib)
            if key not in done:
                done[key] = one(budget_mib, model, training, text)
                kept.write_text(json.dumps(done, indent=1))
            row = done[key]
            rows.append(row)
            print(
                f"{budget_mib:6} {row['predicted_mib']:9.0f} {row['peak_mib']:6.0f} "
                f"{row['used']:6.2f}  {row['plan']}",
                flush=True,
            )
    write_claims("caps", claims(rows), model=options.model, budgets=rows)


if __name__ == "__main__":
    main()
