"""Checkpoints of a run: saving, publishing, checking and resuming."""
