"""launchers.py: the variables of OpenMPI and Slurm become those that torch reads."""

from __future__ import annotations

import pytest

from respec_trainer.errors import ConfigError
from respec_trainer.launchers import adopt_place

OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}
PLACE = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("told", [OPENMPI, SLURM])
def test_a_place_is_adopted(told):
    environment = told | {"MASTER_ADDR": "node0"}
    assert adopt_place(environment) == (5, 8)
    assert environment == told | {"MASTER_ADDR": "node0"} | PLACE


def test_two_tasks_are_a_job_already():
    environment = SLURM | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}
    assert adopt_place(environment := environment | {"MASTER_ADDR": "node0"}) == (1, 2)
    assert environment["LOCAL_SIZE"] == "2"


@pytest.mark.parametrize("told", [OPENMPI, SLURM])
def test_a_port_that_is_set_is_kept(told):
    environment = told | {"MASTER_ADDR": "node0", "MASTER_PORT": "1234"}
    adopt_place(environment)
    assert environment == told | PLACE | {"MASTER_ADDR": "node0", "MASTER_PORT": "1234"}


@pytest.mark.parametrize("told", [OPENMPI, SLURM])
def test_the_address_must_be_set(told):
    with pytest.raises(ConfigError, match="MASTER_ADDR is not set.*deepspeed_env"):
        adopt_place(dict(told))


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2)),
        (SLURM | {"RANK": "0"}, (0, 1)),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, (0, 1)),
        ({"RANK": "3"}, (3, 1)),
    ],
)
def test_who_has_a_place_or_none_keeps_it(environment, place):
    before = dict(environment)
    assert adopt_place(environment) == place
    assert environment == before


def test_hosts_with_different_numbers_of_tasks():
    environment = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4,2(x2)", "MASTER_ADDR": "node0"}
    with pytest.raises(ConfigError, match=r"4,2\(x2\) tasks"):
        adopt_place(environment)
