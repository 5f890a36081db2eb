"""Weights from the trainer to the rollout engines: stream out of the shards, carry over, account for every tensor."""

from respec_trainer.resync.resync import Resync, ResyncReport

__all__ = ["Resync", "ResyncReport"]
