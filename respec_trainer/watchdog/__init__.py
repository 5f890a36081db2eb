"""The watchdog, a thread of every rank: ends the run, with one message, if a rank hangs or is gone."""

from respec_trainer.watchdog.watchdog import Watchdog

__all__ = ["Watchdog"]
