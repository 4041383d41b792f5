"""Measurements behind the claims; each module runs as `python -m benchmarks.NAME`."""
