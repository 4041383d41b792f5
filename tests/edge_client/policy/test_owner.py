"""The owner's file: where it is looked for, and what is said of mistakes in it."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from edge_client.config import Settings
from edge_client.errors import ConfigError
from edge_client.outbox import Outbox, look
from edge_client.policy.decide import Used
from edge_client.policy.hours import is_within, parse_window
from edge_client.policy.owner import FILE, Policy, find_policy, read_policy
from edge_client.policy.used import Usage
from protocol.files import user_folder

REPOSITORY = Path(__file__).resolve().parents[3]


def test_where_a_policy_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    state = tmp_path / "state"
    assert find_policy(state, None) == Policy()
    user_folder().mkdir(parents=True)
    (user_folder() / FILE).write_text("nice = 5\n")
    assert find_policy(state, None).nice == 5
    state.mkdir()
    (state / FILE).write_text("nice = 6\n")
    assert find_policy(state, None).nice == 6
    (tmp_path / "mine.toml").write_text("nice = 7\n")
    assert find_policy(state, tmp_path / "mine.toml").nice == 7


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("battery_above = 120", "battery_above: must be at most 100.0, not 120"),
        ('battery_above = "half"', 'battery_above: must be a number, not "half"'),
        ("nice = 2.5", "nice: must be a whole number, not 2.5"),
        ('metered = "never"', "metered: must be 'use' or 'wait', not \"never\""),
        ("batery_above = 3", "there is no setting 'batery_above'; did you mean 'battery_above'?"),
        (
            "x = 3",
            "there is no setting 'x'; there are battery_above, temperature_below, idle_below",
        ),
        ('hours = "22:00-07:00"', "hours: must be a list"),
        ('hours = ["22-7"]', "hours: '22-7' is not a window of hours: write '22:00-07:00'"),
        ('hours = ["25:00-26:00"]', "hours: '25:00-26:00': a day has the times 00:00 to 24:00"),
        ('hours = ["moon 1:00-2:00"]', "hours: 'moon 1:00-2:00': days are mon, tue"),
        ('hours = ["08:00-08:00"]', "hours: '08:00-08:00' is no time at all"),
        ("hours = ", "line 1 (hours =) is not TOML"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as mistake:
        read_policy(path)
    assert said in str(mistake.value)
    assert str(path) in str(mistake.value) and "\n" not in str(mistake.value)


def test_a_policy_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        find_policy(tmp_path, tmp_path / "policy.toml")


def test_windows_and_days() -> None:
    assert parse_window("fri-mon 08:00 - 09:30").days == {4, 5, 6, 0}
    assert parse_window("Mon,WED 8:00-9:30").days == {0, 2}
    night = [parse_window("sun 22:00-06:00")]
    assert is_within(night, datetime(2026, 3, 2, 5, 59)), (
        "the morning of a Monday is Sunday's night"
    )
    assert not is_within(night, datetime(2026, 3, 2, 6, 0))
    assert not is_within(night, datetime(2026, 3, 3, 5, 0))
    assert is_within([parse_window("00:00-24:00")], datetime(2026, 3, 3, 23, 59))


def test_every_setting_is_in_the_guide() -> None:
    guide = (REPOSITORY / "docs" / "device.md").read_text()
    assert [name for name in Policy.model_fields if f"`{name}`" not in guide] == []


def test_what_a_day_has_cost_outlives_a_restart(tmp_path: Path) -> None:
    now = datetime(2026, 3, 2, 23, 0)
    outbox = Outbox(tmp_path)
    usage = Usage(outbox, lambda: now)
    usage.note_bytes(1000)
    usage.note_bytes(1500)
    usage.note_training(60.0)
    assert usage.today() == Used(1500, 60.0)
    usage.keep()
    outbox.close()
    outbox = Outbox(tmp_path)
    usage = Usage(outbox, lambda: now)
    usage.note_bytes(10)  # of another link, which begins at nothing
    assert usage.today() == Used(1510, 60.0)
    now = datetime(2026, 3, 3, 0, 1)
    assert usage.today() == Used(), "what was left of the day before is that day's"
    usage.note_training(1.0)
    usage.keep()
    outbox.close()
    assert look(tmp_path, "2026-03-02")[2:] == (1510, 60.0)
    assert look(tmp_path, "2026-03-03")[2:] == (0, 1.0)


def test_settings_have_a_policy_that_allows_all() -> None:
    fields = Settings.__dataclass_fields__
    assert fields["policy"].default_factory is Policy  # type: ignore[misc]


def test_a_byte_order_mark_is_not_a_mistake(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_bytes("\ufeffbattery_above = 40\n".encode())
    assert read_policy(path).battery_above == 40
