"""The watchdog: a rank, host or link that is gone, or a rank that hangs, ends the run everywhere, with one message."""

from respec_trainer.watchdog.watchdog import Watchdog

__all__ = ["Watchdog"]
