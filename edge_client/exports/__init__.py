"""A model with an adapter merged in, to be used elsewhere than in training.

`write` makes it: `merge` (a folder of transformers), `graph` (ONNX with a KV cache) and `quantise`
(the same in int8) on a computer with torch. `manifest` says what it is of; it reads and checks it
where there is no torch.
"""
