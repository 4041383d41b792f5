"""What mutated bytes have brought to light, each as the smallest input that shows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from protocol.bands import parse_band
from protocol.errors import ProtocolError
from protocol.tensors import encode
from tests.aggregator.uploading import Aggregator, make_job, update


def test_a_dtype_that_is_no_unicode_is_refused_and_the_intake_goes_on(tmp_path: Path) -> None:
    aggregator = Aggregator(tmp_path, make_job())
    aggregator.greet()
    good = encode(update(aggregator.job), "f32")
    size = int.from_bytes(good[:8], "little")
    header = good[8 : 8 + size].replace(b'"F32"', b'"\\ud800"', 1)
    bad = len(header).to_bytes(8, "little") + header + good[8 + size :]
    (answer,) = aggregator.deliver(aggregator.manifest(bad), bad)
    assert answer.kind == "reject" and "'\\ud800'" in answer.reason
    (answer,) = aggregator.deliver(aggregator.manifest(good), good)
    assert answer.kind == "done"
    aggregator.store.close()


@pytest.mark.parametrize("name", ["٣-٤", "0-" + "9" * 5000, "0-100000", "²-³", "0-2\n"])
def test_a_band_has_one_name_and_no_other(name: str) -> None:
    with pytest.raises(ProtocolError, match="not a rank band"):
        parse_band(name)
