"""The watchdog: ends the run on all ranks, with one message, if a rank hangs or a rank, host or link is gone."""

from respec_trainer.watchdog.watchdog import Watchdog

__all__ = ["Watchdog"]
