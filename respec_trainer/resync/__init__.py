"""Weight transfer from the ranks that train to the engines: gather the shards, send them, verify every tensor."""

from respec_trainer.resync.resync import Resync, ResyncReport

__all__ = ["Resync", "ResyncReport"]
