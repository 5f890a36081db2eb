"""Producing samples: the rollout engine, and what it needs on a machine without a GPU."""
