"""Turn a device's own text into batches: read → split → tokenize → pack → batches.

    reading = read_examples([Path("notes/")])                    # examples, and bad rows by name
    splits = split_examples(reading.examples, seed=7)            # train | trust | held_out
    sequences = tokenize(splits.train, tokenizer, max_tokens=256)  # ids and shifted labels
    rows = pack(sequences, 256, seed=7)                          # whole sequences, no padding
    stream = BatchStream(rows, micro_batch=4, seed=7)            # endless, resumable

The text never leaves this path but as numbers: nothing here writes, sends or logs it.
"""

from edge_client.data.example import ACCEPTED, Completion, Example, Turn
from edge_client.data.pack import (
    Batch,
    BatchStream,
    PackedRow,
    StreamState,
    block_causal_mask,
    evaluation_batches,
    label_histogram,
    pack,
    packing_efficiency,
    step_sample,
    text_batches,
)
from edge_client.data.read import Problem, Reading, check_paths, read_examples
from edge_client.data.split import SHARES, Splits, split_examples
from edge_client.data.tokenize import IGNORED, TokenSequence, tokenize

__all__ = [
    "ACCEPTED",
    "IGNORED",
    "SHARES",
    "Batch",
    "BatchStream",
    "Completion",
    "Example",
    "PackedRow",
    "Problem",
    "Reading",
    "Splits",
    "StreamState",
    "TokenSequence",
    "Turn",
    "block_causal_mask",
    "check_paths",
    "evaluation_batches",
    "label_histogram",
    "pack",
    "packing_efficiency",
    "read_examples",
    "split_examples",
    "step_sample",
    "text_batches",
    "tokenize",
]
