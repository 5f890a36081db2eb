"""Prepare an audit: its configuration, the environment of a single rank, and the cells that are possible."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

from respec_trainer.audit.cells import CONTROL, SHORT, Cell, Mode, all_cells, all_modes
from respec_trainer.config import Config
from respec_trainer.config_file import load_config
from respec_trainer.errors import ConfigError
from respec_trainer.network import free_port
from respec_trainer.speculation.algorithms import DrafterFolder, algorithm_of


def prepare_audit(path: str, overrides: Sequence[str]) -> Config:
    """Load and check the configuration with an audit's overrides, and make this process the only rank of a run."""
    from respec_trainer.compat import prepare
    from respec_trainer.preflight.checks import preflight

    warnings.filterwarnings("ignore")  # libraries warn about missing hardware
    single_rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= single_rank | {"MASTER_PORT": str(free_port())}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    first = load_config(path, overrides)
    prepare(first.run.device)
    from respec_trainer.audit.auditor import OVERRIDES

    config = load_config(path, [*overrides, *OVERRIDES])
    preflight(config, 1, 0)
    return config


def wanted_cells(config: Config, part: str, short: bool, control: bool) -> tuple[list[Cell], dict[str, Mode]]:
    """Return the possible cells whose name contains `part`, and all modes by name.

    Args:
        short: choose from the cells of the short form.
        control: return the control's cell alone.

    Raises ConfigError if no cell's name contains `part`.
    """
    modes = all_modes()
    if control:
        return [Cell(CONTROL.name)], modes | {CONTROL.name: CONTROL}
    has_drafter = algorithm_of(config.speculation).folder is DrafterFolder.EAGLE3  # loading checked that it has a path
    possible = [c for c in (SHORT if short else all_cells()) if has_drafter or modes[c.mode].needs == "nothing"]
    cells = [cell for cell in possible if part in cell.name]
    if not cells:
        raise ConfigError(f"no cell's name contains {part!r}; they are: {'; '.join(cell.name for cell in possible)}")
    return cells, modes
