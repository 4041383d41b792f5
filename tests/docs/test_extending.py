"""The rule of docs/extending.md, as it stands there."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from aggregator.merge import RoundView, Update
from aggregator.merge.installed import Foreign
from protocol.adapter import initial_adapter, select
from tests.docs.commands import ROOT

SHAPES = {"layers.0.q": (12, 8), "layers.1.q": (8, 12)}


def test_the_rule_of_the_guide_merges_a_round() -> None:
    text = (ROOT / "docs/extending.md").read_text()
    code = re.search(r"```python\n# my_rules.py\n(.*?)```", text, re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code[1], names)
    previous = initial_adapter(SHAPES, 4, 2.0, seed=0)
    other = initial_adapter(SHAPES, 4, 2.0, seed=1)
    updates = []
    for device, rank in (("small", 1), ("large", 3)):
        at = {name: np.arange(rank) for name in SHAPES}
        updates.append(Update(device, select(other, at), at, 10, {}))
    view = RoundView(previous, updates, SHAPES, 4, seed=0)
    merged = Foreign("rule 'largest'", names["largest"])(view, {})
    assert merged.weights == {"small": 0.0, "large": 1.0}
    for name in SHAPES:
        found = merged.adapter.layers[name].a
        assert np.array_equal(found[:3], other.layers[name].a[:3])
        assert np.array_equal(found[3:], previous.layers[name].a[3:])
