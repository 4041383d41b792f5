"""Run on the device: read profile → plan → data → train → outbox, in that order."""
