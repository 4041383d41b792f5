"""The live page, its HTTP API and `/metrics`: what an operator sees of a running aggregator.

Everything is read from the read-only snapshots of `aggregator.view` on a thread of its own, and
every action goes through `aggregator.control`: the page holds no state, and never holds up merging.
HTML is made here; the browser's part is one small script that replaces what has changed.
"""
