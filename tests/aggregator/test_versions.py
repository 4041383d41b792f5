"""A version is what its files say, in memory and after a restart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from aggregator.places import common
from aggregator.store import Store
from aggregator.versions import Versions, first_version
from protocol.adapter import Adapter, Factors
from protocol.tensors import round_trip
from tests.aggregator.uploading import make_job

JOB = make_job(encoding_down="bf16")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path)
    yield opened
    opened.close()


def times(adapter: Adapter, factor: float) -> Adapter:
    return Adapter(
        {n: Factors(factor * f.a, f.b) for n, f in adapter.layers.items()}, adapter.scale
    )


def assert_loads(versions: Versions, number: int, written: Adapter) -> None:
    found = versions.load(number)
    assert found.scale == written.scale
    assert list(found.layers) == list(written.layers)
    for name, factors in written.layers.items():
        np.testing.assert_array_equal(found.layers[name].a, round_trip(factors.a, "bf16"))
        np.testing.assert_array_equal(found.layers[name].b, round_trip(factors.b, "bf16"))


def test_a_version_is_loaded_as_it_was_published(store: Store) -> None:
    versions, first = Versions(JOB, store), first_version(JOB)
    adapters = {1: first, 2: times(first, 3.0), 3: times(first, -1.0)}
    for number, adapter in adapters.items():
        manifest = versions.write(adapter, version=number, parent=number - 1 or None)
        assert list(manifest.bands) == ["0-2", "2-64", "64-128"]
        for name, info in manifest.bands.items():
            assert store.band_file(common(number), name).stat().st_size == info.bytes
    for number in (1, 2, 2, 3, 1):
        assert_loads(versions, number, adapters[number])
        assert_loads(Versions(JOB, store), number, adapters[number])


def test_nobody_can_write_into_a_version(store: Store) -> None:
    versions = Versions(JOB, store)
    versions.write(first_version(JOB), version=1, parent=None)
    for factors in versions.load(1).layers.values():
        for values in (factors.a, factors.b):
            with pytest.raises(ValueError, match="read-only"):
                values[:] = 5


def test_the_last_version_read_is_read_once(store: Store) -> None:
    versions = Versions(JOB, store)
    versions.write(first_version(JOB), version=1, parent=None)
    found = versions.load(1)
    store.band_file(common(1), "0-2").unlink()
    assert versions.load(1) is found


def test_a_version_written_again_is_read_again(store: Store) -> None:
    """As after a crash between writing a version and committing it."""
    versions, first = Versions(JOB, store), first_version(JOB)
    versions.write(first, version=1, parent=None)
    versions.load(1)
    versions.write(times(first, 2.0), version=1, parent=None)
    assert_loads(versions, 1, times(first, 2.0))
