"""Text of a fleet's devices from a folder that anyone can fill:

    DIR/datasets/NAME/train.jsonl    one row a line: {"text": …, "domain": …}, or
    DIR/datasets/NAME/test.jsonl     {"instruction": …, "response": …, "domain": …}
    DIR/models/NAME/                 a Hugging Face model folder with its tokenizer

Other fields are ignored. Devices are cut by domain (a language, a role, a service): the domains
with most text, each shared out by whole rows among its devices, so that no text is in two devices
or in two splits. Training and trust text come from train.jsonl, held-out text from test.jsonl.
The same rows and seed give the same devices.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.simulation import SimulatedDevice
from edge_client.data import Example, Splits
from edge_client.data.example import BadRow, example_of_row, parse_json
from edge_client.errors import DataError

RANKS = (2, 16, 4, 8, 8, 4, 16, 2)
"""Of the eight devices, in order; two of one domain have unlike ranks."""
HELD = max(RANKS)
DEVICES_PER_DOMAIN = {"shakespeare_roles": 1}
PER_DOMAIN = 2
TRUST_SHARE = 0.15
"""Of a device's text in train.jsonl, by characters."""
Domains = Mapping[str, Sequence[Example]]


def read_devices(
    folder: Path,
    dataset: str,
    *,
    seed: int,
    ranks: Sequence[int] = RANKS,
    per_domain: int = PER_DOMAIN,
) -> list[SimulatedDevice]:
    """Return devices of `ranks` with text of a dataset of the folder, some of each domain.

    Raises:
        DataError: a file is missing or has a bad row (it is named), or has too few domains.
    """
    train = read_domains(folder / "datasets" / dataset / "train.jsonl")
    test = read_domains(folder / "datasets" / dataset / "test.jsonl")
    per_domain = DEVICES_PER_DOMAIN.get(dataset, per_domain)
    return cut_devices(train, test, per_domain, seed=seed, ranks=ranks)


def read_domains(path: Path) -> dict[str, list[Example]]:
    """Read the rows of a file by domain; of equal texts the first is kept.

    Raises:
        DataError: it can't be read, or a row isn't as this module says.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    domains: dict[str, list[Example]] = defaultdict(list)
    seen = set()
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_json(line)
            if isinstance(row, dict) and "instruction" in row:
                row = {
                    "prompt": row["instruction"],
                    "completion": row.get("response"),
                    "domain": row.get("domain"),
                }
            example = example_of_row(row, path, number)
            domain = row.get("domain") if isinstance(row, dict) else None
            if not isinstance(domain, str) or not domain:
                raise BadRow("it has no 'domain', a string")
        except BadRow as error:
            raise DataError(f"{path}:{number}: {error}") from None
        if example.payload not in seen:
            seen.add(example.payload)
            domains[domain].append(example)
    return dict(domains)


def cut_devices(
    train: Domains,
    test: Domains,
    per_domain: int,
    *,
    seed: int,
    ranks: Sequence[int] = RANKS,
) -> list[SimulatedDevice]:
    """Share the text of the largest domains out among devices of `ranks`, `per_domain` to each.

    Raises:
        DataError: there are too few domains with text in both files.
    """
    wanted = len(ranks) // per_domain
    usable = sorted(set(train) & set(test), key=lambda name: (-_characters(train[name]), name))
    if len(usable) < wanted:
        raise DataError(
            f"{wanted} domains with rows in both train.jsonl and test.jsonl are needed, "
            f"here are {len(usable)}"
        )
    known = {example.payload for rows in train.values() for example in rows}
    devices: list[SimulatedDevice] = []
    for domain in usable[:wanted]:
        order = random.Random(f"{seed} {domain}")
        held_out = [example for example in test[domain] if example.payload not in known]
        hands = _dealt(train[domain], per_domain, order)
        guarded_hands = _dealt(held_out, per_domain, order)
        for part, (rows, guarded) in enumerate(zip(hands, guarded_hands, strict=True)):
            trust = _share(rows, TRUST_SHARE)
            name = f"{_slug(domain)}-{part}"
            splits = Splits(rows[trust:], rows[:trust], guarded)
            if not (splits.train and splits.trust and splits.held_out):
                raise DataError(f"domain {domain!r} has too few rows for {per_domain} devices")
            devices.append(SimulatedDevice(name, ranks[len(devices)], HELD, splits))
    return devices


def _dealt(rows: Sequence[Example], hands: int, order: random.Random) -> list[list[Example]]:
    shuffled = order.sample(rows, len(rows))
    return [shuffled[hand::hands] for hand in range(hands)]


def _share(rows: Sequence[Example], share: float) -> int:
    """Return how many rows from the first hold that share of the characters, at least one."""
    wanted, total = share * _characters(rows), 0
    for number, row in enumerate(rows):
        if number and total >= wanted:
            return number
        total += row.characters
    return len(rows)


def _characters(rows: Sequence[Example]) -> int:
    return sum(row.characters for row in rows)


def _slug(domain: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in domain.lower()).split())
