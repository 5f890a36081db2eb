"""launch/train.py for an engine's host that is killed once, in the middle of a rollout.

    python mortal_host.py FILE BATCH --config ...

The process kills itself while its engine runs the BATCHth batch of requests, unless FILE exists. Before, it writes to
FILE its process id, how many requests of the batch were finished, and how many the batch had.
"""

from __future__ import annotations

import itertools
import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path
from unittest import mock

AFTER_SECONDS = 0.02  # less than a rollout takes
TRAIN = Path(__file__).parents[3] / "launch/train.py"


def main() -> None:
    report, batch = Path(sys.argv[1]), int(sys.argv[2])
    sys.argv = [str(TRAIN), *sys.argv[3:]]
    from respec_trainer.rollout.sglang.engine import SGLangEngine

    submit, numbers = SGLangEngine.submit, itertools.count(1)

    def submit_and_die(engine, requests):
        pending = submit(engine, requests)
        if next(numbers) == batch and not report.exists():
            threading.Thread(target=_die, args=(pending, report), daemon=True).start()
        return pending

    with mock.patch.object(SGLangEngine, "submit", submit_and_die):
        runpy.run_path(str(TRAIN), run_name="__main__")


def _die(pending, report: Path) -> None:
    time.sleep(AFTER_SECONDS)
    report.write_text(f"{os.getpid()} {pending.done()} {len(pending.requests)}")
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
