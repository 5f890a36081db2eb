"""A rank's number and host, from the environment variables of its launcher.

DeepSpeed's own launcher and torchrun set the variables that torch reads. mpirun and srun, which `deepspeed` uses for
`--launcher openmpi` and `--launcher slurm`, set other variables, and no address at which the ranks connect.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping

from respec_trainer.errors import ConfigError

DEFAULT_PORT = "29500"  # DeepSpeed's and torch's
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")
OPENMPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")


def adopt_place(environment: MutableMapping[str, str]) -> tuple[int, int]:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE and MASTER_PORT from the variables of OpenMPI or Slurm, if present.

    Returns this process's rank and the number of ranks: 0 and 1 if no launcher started it. Raises ConfigError if
    OpenMPI or Slurm started the ranks and MASTER_ADDR is not set.
    """
    place = None if "RANK" in environment else _place(environment)
    if place is not None:
        _adopt(place, environment)
    return int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))


def _adopt(place: list[str], environment: MutableMapping[str, str]) -> None:
    if "MASTER_ADDR" not in environment:
        raise ConfigError(
            "MASTER_ADDR is not set: mpirun and srun set no address at which the ranks connect; put "
            "MASTER_ADDR=ADDRESS of rank 0's host into .deepspeed_env (see docs/launch.md), or export it"
        )
    environment.update(zip(PLACE, place, strict=True))
    environment.setdefault("MASTER_PORT", DEFAULT_PORT)


def _place(environment: Mapping[str, str]) -> list[str] | None:
    if OPENMPI[0] in environment:
        return [environment[name] for name in OPENMPI]
    # A shell inside an allocation has these variables too, but it is a step of one task.
    if int(environment.get(SLURM[1], "1")) > 1:
        return [*(environment[name] for name in SLURM), _slurm_local_size(environment)]
    return None


def _slurm_local_size(environment: Mapping[str, str]) -> str:
    """Return the tasks of each host: 8 for "8(x2)". Raises ConfigError if hosts have different numbers, as in "8,4"."""
    tasks = environment["SLURM_STEP_TASKS_PER_NODE"]
    same = re.fullmatch(r"(\d+)(\(x\d+\))?", tasks)
    if same is None:
        raise ConfigError(
            f"Slurm runs {tasks} tasks on the hosts: give all of them the same number (--ntasks-per-node)"
        )
    return same[1]
