"""An NPU's provider comes first where it is and loads; what could not be taken is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from device_profiles.schema import Accelerator, DeviceProfile, Memory
from edge_client.chat.onnx_model import OnnxDecoder
from edge_client.chat.providers import CPU, Candidate, candidates
from edge_client.errors import ConfigError, ModelError
from edge_client.exports.manifest import GRAPH
from tests.edge_client.exports.models import exported_base, llama, needs_optimum

OPENVINO, QNN = "OpenVINOExecutionProvider", "QNNExecutionProvider"


def profile(providers: tuple[str, ...], *accelerators: tuple[str, str]) -> DeviceProfile:
    return DeviceProfile(
        name="it",
        title="it",
        board_or_model="it",
        architecture="x86_64",
        memory=Memory(total_mib=1, available_mib=1),
        accelerators=tuple(
            Accelerator.model_validate({"kind": kind, "name": name, "shares_system_memory": True})
            for kind, name in accelerators
        ),
        execution_providers=providers,
    )


INTEL = (("gpu", "Intel graphics"), ("npu", "Intel NPU"))


def test_the_npu_comes_first_then_the_gpu_then_the_cpu() -> None:
    tried, missing = candidates(profile((OPENVINO, CPU), *INTEL))
    assert [c.provider for c in tried] == [OPENVINO, OPENVINO, CPU]
    assert [c.options.get("device_type") for c in tried[:2]] == ["NPU", "GPU"]
    assert missing == []


def test_what_this_runtime_has_no_provider_for_is_said() -> None:
    tried, missing = candidates(profile((CPU,), ("npu", "Qualcomm Hexagon NPU")))
    assert tried == [Candidate(CPU)]
    assert missing == [f"the Qualcomm Hexagon NPU is not used: this ONNX Runtime has no {QNN}"]
    assert candidates(profile((OPENVINO, CPU))) == ([Candidate(CPU)], [])  # no such device here


def test_the_owner_decides() -> None:
    found = profile((OPENVINO, CPU), *INTEL)
    assert candidates(found, "cpu") == ([Candidate(CPU)], [])
    (forced,), _ = candidates(found, "OpenVINO")
    assert (forced.provider, forced.options["device_type"]) == (OPENVINO, "NPU")
    with pytest.raises(ConfigError, match=f"--provider QNN: .* it has {OPENVINO}, {CPU}"):
        candidates(found, "QNN")


@needs_optimum
def test_a_provider_that_does_not_load_gives_way_to_the_next() -> None:
    graph = exported_base(llama(), "onnx") / GRAPH
    opened = OnnxDecoder(graph, [Candidate(QNN), Candidate(CPU)], 1).opened
    assert opened.provider == CPU
    assert opened.refused == (f"{QNN} does not load: this ONNX Runtime was built without it",)
    with pytest.raises(ModelError, match=f"can't open .*{QNN} does not load"):
        OnnxDecoder(graph, [Candidate(QNN)], 1)


@needs_optimum
def test_a_graph_that_is_none_or_another_is_refused_in_one_line(tmp_path: Path) -> None:
    from onnx import TensorProto, helper, save

    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    other = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [value], [out])
    model = helper.make_model(other, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    save(model, tmp_path / "other.onnx")
    for name, said in (("broken", "can't open"), ("other", "no graph of a model with a KV cache")):
        with pytest.raises(ModelError, match=said) as caught:
            OnnxDecoder(tmp_path / f"{name}.onnx", [Candidate(CPU)], 1)
        assert "\n" not in str(caught.value)
