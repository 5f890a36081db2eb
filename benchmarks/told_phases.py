"""launch/train.py, whose first rank writes its phase to the file $PHASE_FILE: for benchmarks that aim at one."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

from respec_trainer.telemetry.phases import PhaseClock

TRAIN = Path(__file__).parents[1] / "launch/train.py"
PHASE_FILE = "PHASE_FILE"


def tell_phases(file: Path) -> None:
    enter = PhaseClock.__call__

    def tell(clock: PhaseClock, name: str):
        file.write_text(name)
        return enter(clock, name)

    PhaseClock.__call__ = tell


if __name__ == "__main__":
    if os.environ.get("RANK") == "0":
        tell_phases(Path(os.environ[PHASE_FILE]))
    runpy.run_path(str(TRAIN), run_name="__main__")
