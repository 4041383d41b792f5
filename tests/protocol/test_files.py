"""Files that outlive the process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from protocol.adapter import Adapter, Factors
from protocol.files import write_peft


def test_an_exported_adapter_has_the_names_of_peft(tmp_path: Path) -> None:
    """On the wire the two modules would be stacked; a module of rank 0 is left out."""
    rng = np.random.default_rng(0)
    layers = {
        f"model.{name}": Factors(
            rng.standard_normal((rank, 6)).astype(np.float32),
            rng.standard_normal((4, rank)).astype(np.float32),
        )
        for name, rank in {"q": 2, "k": 2, "none": 0}.items()
    }
    write_peft(Adapter(layers, 2.0), tmp_path, base_model="toy")
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert set(found) == {
        f"base_model.model.model.{module}.lora_{factor}.weight"
        for module in ("q", "k")
        for factor in ("A", "B")
    }
    for name, factors in layers.items():
        if factors.rank:
            prefix = f"base_model.model.{name}.lora_"
            np.testing.assert_array_equal(found[f"{prefix}A.weight"], factors.a)
            np.testing.assert_array_equal(found[f"{prefix}B.weight"], factors.b)
