from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from respec_trainer.errors import ConfigError
from tests.support.models import tiny_run_config
from tests.support.processes.ranks import run_ranks


def places(tp: int) -> dict:
    from respec_trainer.actor.parallel import DeepSpeedMpu, init_parallel, shutdown_parallel

    topology = init_parallel(tiny_run_config("-", {"actor.parallel.tp": tp}))
    mpu = DeepSpeedMpu()
    found = {
        "place": (topology.rank, topology.tp_rank, topology.dp_rank),
        "sizes": (topology.world_size, topology.tp, topology.dp),
        "tp_group": dist.get_process_group_ranks(topology.tp_group),
        "dp_group": dist.get_process_group_ranks(topology.dp_group),
        "mpu": (mpu.get_model_parallel_rank(), mpu.get_model_parallel_world_size(), mpu.get_data_parallel_rank()),
        "mpu_dp": mpu.get_data_parallel_group_ranks(),
        "device": str(topology.device),
        "seed": torch.initial_seed(),
    }
    shutdown_parallel()
    shutdown_parallel()
    return found | {"left": dist.is_initialized()}


def test_neighbors_share_a_copy_of_the_model():
    found = run_ranks(4, places, 2)
    assert [f["place"] for f in found] == [(0, 0, 0), (1, 1, 0), (2, 0, 1), (3, 1, 1)]
    assert [f["tp_group"] for f in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [f["dp_group"] for f in found] == [f["mpu_dp"] for f in found] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [f["mpu"] for f in found] == [(0, 2, 0), (1, 2, 0), (0, 2, 1), (1, 2, 1)]
    assert all(f["sizes"] == (4, 2, 2) and f["device"] == "cpu" and f["seed"] == 0 for f in found)
    assert not any(f["left"] for f in found)


def threads_of_a_rank() -> int:
    from respec_trainer.actor.parallel import init_parallel, shutdown_parallel

    os.environ.pop("OMP_NUM_THREADS")
    init_parallel(tiny_run_config("-"))
    count = torch.get_num_threads()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    shutdown_parallel()
    return count


def test_ranks_of_a_host_share_its_cores():
    assert run_ranks(2, threads_of_a_rank) == [max(1, len(os.sched_getaffinity(0)) // 2)] * 2


def test_without_a_launcher_the_remedy_is_named(monkeypatch):
    from respec_trainer.actor.parallel import init_parallel

    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match="RANK.* not set; start with `deepspeed"):
        init_parallel(tiny_run_config("-"))


def test_a_world_the_configuration_does_not_suit_is_refused_before_any_group(monkeypatch):
    from respec_trainer.actor.parallel import init_parallel

    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 3, "MASTER_ADDR": "x", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ConfigError, match="tp=2 does not divide the 3 ranks"):
        init_parallel(tiny_run_config("-", {"actor.parallel.tp": 2}))
    assert not dist.is_initialized()


def ask_for_another_accelerator() -> str:
    from respec_trainer.compat.deepspeed_cpu import prepare_deepspeed
    from respec_trainer.errors import RespecError

    prepare_deepspeed("cpu")
    try:
        prepare_deepspeed("cuda")
    except RespecError as error:
        return str(error)
    return "nothing was raised"


def test_deepspeed_on_the_wrong_accelerator_is_refused():
    assert "start with DS_ACCELERATOR=cuda" in run_ranks(1, ask_for_another_accelerator)[0]
