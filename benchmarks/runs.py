"""Commands of the runs that benchmarks start: launch/train.py under the deepspeed launcher, as a user starts it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from respec_trainer.network import free_port

REPOSITORY = Path(__file__).parents[1]
QUICKSTART = str(REPOSITORY / "configs/quickstart.yaml")


def run_command(
    ranks: int, config: str, folder: Path | str, name: str, overrides: Sequence[str], script: str = "launch/train.py"
) -> list[str]:
    """Return a run's command, to be started in REPOSITORY.

    The port is a free one, because the port of a run that was killed may stay occupied for a while.
    """
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [str(launcher), "--num_gpus", str(ranks), "--master_port", str(free_port()), str(REPOSITORY / script)]
    return [*command, "--config", config, f"run.dir={folder}", f"run.name={name}", *overrides]
