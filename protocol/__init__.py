"""What travels between devices and the aggregator: messages, bands, tensors, chunks, signatures.

Imports neither `edge_client` nor `aggregator`. Read in this order: `adapter` (the thing that is
shared), `tensors` (its bytes), `bands` (its slices), `chunks` (its pieces on the wire),
`messages` (what is said about it), `signing` (who said it), `transport` (how it travels).
"""

VERSION = 1
"""Major version of the protocol; it stands in every topic."""
