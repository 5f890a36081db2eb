"""launch/train.py for an engine's host that is killed once: in the middle of the rollout that begins with a batch.

    python mortal_host.py FILE BATCH --config ...

The process dies of the BATCHth batch of requests that its engine gets, unless FILE is there; FILE then says which
process it was, and how many requests of the batch had been answered, of how many.
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
    grave, batch = Path(sys.argv[1]), int(sys.argv[2])
    sys.argv = [str(TRAIN), *sys.argv[3:]]
    from respec_trainer.rollout.sglang.engine import SGLangEngine

    submit, numbers = SGLangEngine.submit, itertools.count(1)

    def submit_and_die(engine, requests):
        pending = submit(engine, requests)
        if next(numbers) == batch and not grave.exists():
            threading.Thread(target=_die, args=(pending, grave), daemon=True).start()
        return pending

    with mock.patch.object(SGLangEngine, "submit", submit_and_die):
        runpy.run_path(str(TRAIN), run_name="__main__")


def _die(pending, grave: Path) -> None:
    time.sleep(AFTER_SECONDS)
    grave.write_text(f"{os.getpid()} {pending.done()} {len(pending.requests)}")
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
