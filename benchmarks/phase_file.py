"""Run launch/train.py, with rank 0 writing its phase to the file $PHASE_FILE, for benchmarks that need the phase."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

from respec_trainer.telemetry.phases import PhaseClock

TRAIN = Path(__file__).parents[1] / "launch/train.py"
PHASE_FILE = "PHASE_FILE"


def write_phases(file: Path) -> None:
    """Patch PhaseClock to write the name of every phase to the file when it begins."""
    enter = PhaseClock.__call__

    def write_and_enter(clock: PhaseClock, name: str):
        file.write_text(name)
        return enter(clock, name)

    PhaseClock.__call__ = write_and_enter


if __name__ == "__main__":
    if os.environ.get("RANK") == "0":
        write_phases(Path(os.environ[PHASE_FILE]))
    runpy.run_path(str(TRAIN), run_name="__main__")
