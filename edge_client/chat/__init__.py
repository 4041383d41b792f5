"""Answer text with what a device has learnt, on ONNX Runtime or torch.

`choose` finds the adapter and the export of it, `speaker` opens the model (`onnx_model`, on the
provider that `providers` finds, or `torch_model`), `generate` draws tokens, `text` turns them into
text as they come, and `talk` is the conversation.
"""
