"""Process groups of tensor and data parallelism, and the interface to them that DeepSpeed needs.

Ranks 0 .. tp-1 together hold one copy of the model, the next tp ranks the second copy, and so on.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from respec_trainer.compat import resolve_device
from respec_trainer.compat.deepspeed_cpu import prepare_deepspeed
from respec_trainer.compat.megatron_cpu import prepare_megatron
from respec_trainer.config import Config
from respec_trainer.errors import ConfigError
from respec_trainer.placement import Placement, check_world
from respec_trainer.processes import local_size


@dataclass(frozen=True)
class Topology:
    """This rank's index among the training ranks. tp_rank counts within one copy of the model, dp_rank the copies."""

    rank: int
    world_size: int
    tp: int
    tp_rank: int
    dp: int
    dp_rank: int
    device: torch.device

    @property
    def tp_group(self) -> dist.ProcessGroup:
        return _parallel_state().get_tensor_model_parallel_group()

    @property
    def dp_group(self) -> dist.ProcessGroup:
        return _parallel_state().get_data_parallel_group()


def init_parallel(config: Config) -> Topology:
    """Make all process groups of the training ranks, and seed the random numbers.

    Megatron and DeepSpeed use all ranks of the default group, so ranks that only hold engines are not in it. Reads
    RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, which launchers set. Raises ConfigError if one is not
    set, or the world size does not fit the configuration.
    """
    missing = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} - set(os.environ)
    if missing:
        names = ", ".join(sorted(missing))
        raise ConfigError(f"{names} not set; start with `deepspeed --num_gpus N launch/train.py ...`")
    check_world(config, int(os.environ["WORLD_SIZE"]))
    device = _device(config.run.device)
    prepare_deepspeed(device.type)
    prepare_megatron(device.type)
    _limit_threads(device)
    import deepspeed
    from megatron.core import tensor_parallel

    backend = "nccl" if device.type == "cuda" else "gloo"
    rank, world_size = int(os.environ["RANK"]), Placement.of(config, int(os.environ["WORLD_SIZE"])).trainers
    # The watchdog's report on a rank that hangs has more details than a timeout of a collective, so it must come first.
    patience = timedelta(seconds=2 * config.run.hang_timeout)
    position = {"rank": rank, "world_size": world_size}
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=patience, **position)
    state, tp = _parallel_state(), config.actor.parallel.tp
    state.initialize_model_parallel(tensor_model_parallel_size=tp, create_gloo_process_groups=False)
    torch.manual_seed(config.run.seed)
    # Megatron's tracker of random states needs CUDA, its tracker for inference does not. No dropout needs a seed.
    tensor_parallel.model_parallel_cuda_manual_seed(config.run.seed, inference_rng_tracker=device.type == "cpu")
    return Topology(rank, world_size, tp, rank % tp, world_size // tp, rank // tp, device)


def shutdown_parallel() -> None:
    """Destroy every process group; safe to call twice, and before init_parallel."""
    if dist.is_initialized():
        _parallel_state().destroy_model_parallel()
        import deepspeed

        deepspeed.comm.destroy_process_group()


class DeepSpeedMpu:
    """Megatron's parallel state with three functions that DeepSpeed 0.19.8 needs and Megatron 0.16.1 removed."""

    def __getattr__(self, name: str):
        return getattr(_parallel_state(), name)

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(_parallel_state().get_model_parallel_group())

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(_parallel_state().get_model_parallel_group())

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(_parallel_state().get_data_parallel_group())


def _device(wanted: str) -> torch.device:
    if resolve_device(wanted) == "cpu":
        return torch.device("cpu")
    local_rank, visible = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local_rank >= visible:
        raise ConfigError(f"run.device=cuda, but local rank {local_rank} has no GPU of its own: {visible} visible")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _limit_threads(device: torch.device) -> None:
    """Divide the cores between the ranks of this host: by default every rank would use all of them."""
    if device.type != "cpu" or "OMP_NUM_THREADS" in os.environ:
        return
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size()))


def _parallel_state():
    # Imported late, because Megatron takes seconds, and DeepSpeed and the shims must be first.
    from megatron.core import parallel_state

    return parallel_state
