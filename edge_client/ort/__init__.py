"""Training with ONNX Runtime, without torch on the device.

On a computer with torch: `forward` (the model as an ONNX graph) → `gradient` (gradients of its LoRA
factors, and the loss) → `export` (all files of an artifact set). On the device: `artifact` (reads
and checks the set), `runtime` (ONNX Runtime without what it would import besides), and the trainer,
edge_client.trainer.onnx_trainer.
"""
