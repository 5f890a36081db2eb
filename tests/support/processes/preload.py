"""The first and the last step of a template before it forks; see `forking`."""

from __future__ import annotations

import atexit
import os
import threading

from respec_trainer.processes import collect_garbage_again, collect_no_garbage

collect_no_garbage()


def become_template() -> None:
    """Exclude imported objects from garbage collection, and end without the exit handlers of libraries.

    Raises AssertionError if there are threads: a forked process would not have them.
    """
    assert threading.active_count() == 1, f"imports started threads: {threading.enumerate()}"
    collect_garbage_again()
    atexit.register(_end, os.getpid())


def _end(template: int) -> None:
    if os.getpid() == template:
        os._exit(0)
