"""Before an audit: its configuration, its place as the only rank, and the cells it can go through."""

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
    """The configuration as an audit needs it, checked; and this process made the only rank of a run."""
    from respec_trainer.compat import prepare
    from respec_trainer.preflight.checks import preflight

    warnings.filterwarnings("ignore")  # of libraries, about hardware that is not there
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= place | {"MASTER_PORT": str(free_port())}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    first = load_config(path, overrides)
    prepare(first.run.device)
    from respec_trainer.audit.auditor import OVERRIDES

    config = load_config(path, [*overrides, *OVERRIDES])
    preflight(config, 1, 0)
    return config


def wanted_cells(config: Config, part: str, short: bool, control: bool) -> tuple[list[Cell], dict[str, Mode]]:
    """Cells whose name holds `part` and that the configuration has the parts for, of all or of the short form's; or the
    control alone.
    """
    modes = all_modes()
    if control:
        return [Cell(CONTROL.name)], modes | {CONTROL.name: CONTROL}
    has_drafter = algorithm_of(config.speculation).folder is DrafterFolder.EAGLE3  # and then a path, when it loaded
    possible = [c for c in (SHORT if short else all_cells()) if has_drafter or modes[c.mode].needs == "nothing"]
    cells = [cell for cell in possible if part in cell.name]
    if not cells:
        raise ConfigError(f"no cell's name holds {part!r}; they are: {'; '.join(cell.name for cell in possible)}")
    return cells, modes
