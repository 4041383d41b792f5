"""What is claimed of a sheet: like is compared with like."""

from benchmarks.quality.arms import DEFAULT, LARGEST, Result
from benchmarks.quality.report import Sheet, claims

TWICE = "anchored, rotating, by rank, twice the steps"


def result(loss: float) -> Result:
    return Result(trust=loss, held_out=loss, devices={"d0": loss}, curve=[loss], seconds=1.0)


def sheet(**losses: tuple[float, float]) -> Sheet:
    """Make a sheet from losses by seed."""
    named = {"default": DEFAULT, "bound": LARGEST, "twice": TWICE}
    found = {
        named.get(arm, arm.replace("_", " ").replace("trust ", "trust-")): {
            seed: (1e-3, result(loss)) for seed, loss in enumerate(both)
        }
        for arm, both in losses.items()
    }
    return Sheet("made", "toy", found)


def test_personal_arms_are_compared_with_arms_of_as_many_steps() -> None:
    made = sheet(
        local_only=(3.2, 3.3),
        default=(3.0, 3.1),
        twice=(2.8, 2.9),
        fedavg=(3.1, 3.0),
        bound=(2.9, 3.0),
        trust_validation=(2.9, 2.9),
        shared_and_private=(2.7, 3.1),
    )
    found = {claim.claim.removeprefix("made, toy: "): claim.met for claim in claims(made)}
    assert found == {
        "default against fedavg": False,
        "default against all at the largest rank": False,
        "best personal (trust-validation) against local only": True,
        f"best personal (trust-validation) against {DEFAULT}": True,
        f"best personal (shared and private) against {TWICE}": False,
    }
