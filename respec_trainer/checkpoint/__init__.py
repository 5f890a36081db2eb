"""Checkpoints of a run: saving, publishing, checking and resuming, on every rank that trains."""
