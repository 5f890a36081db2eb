"""collectives.py, on two ranks and without a group: values and errors of one rank reach all ranks."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist

from respec_trainer.collectives import agree, broadcast, from_first, gather, reduce, sum_over
from respec_trainer.errors import ConfigError, EngineError, EngineLostError, ResyncError, TransferError


@pytest.fixture
def on_two_ranks(tmp_path):
    """Return a function that runs a function of the rank on two ranks, and returns the result of each."""

    def run(function: Callable[[int], Any]) -> list[Any]:
        with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:  # each task waits until both run
            calls = [pool.submit(call_in_group, f"file://{tmp_path}/store", rank, function) for rank in range(2)]
            return [call.result(60) for call in calls]

    return run


def call_in_group(place: str, rank: int, function: Callable[[int], Any]) -> Any:
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=2)
    try:
        return function(rank)
    finally:
        dist.destroy_process_group()


class Engine:
    """A stand-in for an engine, dead or not."""

    def __init__(self, failure: EngineError | None = None):
        self.failure, self.ended = failure, False

    def shutdown(self) -> None:
        self.ended = True


def told(rank: int) -> tuple:
    mine = {"rank": rank}
    return gather(mine), broadcast(mine, 1), from_first(lambda: mine)


def test_every_rank_has_the_values_of_the_others(on_two_ranks):
    everyone = [{"rank": 0}, {"rank": 1}]
    assert on_two_ranks(told) == [(everyone, everyone[1], everyone[0])] * 2


def reduced(rank: int) -> tuple:
    values = [rank + 0.5, 10.0 - rank, 2.0**53 - rank]
    return tuple(reduce(values, operation) for operation in ("sum", "max", "min"))


def test_numbers_are_reduced_in_float64(on_two_ranks):
    expected = [2.0, 19.0, 2.0**54 - 1], [1.5, 10.0, 2.0**53], [0.5, 9.0, 2.0**53 - 1]
    assert on_two_ranks(reduced) == [expected] * 2


def summed(rank: int) -> list[list]:
    tensors = torch.tensor([[1, 2], [3, 4]]) * (rank + 1), torch.tensor(7), torch.full((3,), 0.1 + rank).double()
    return [tensor.tolist() for tensor in sum_over(tensors, "cpu")]


def test_tensors_of_all_shapes_are_summed_at_once(on_two_ranks):
    expected = [[[3, 6], [9, 12]], 14, [torch.tensor(0.1).double().item() + torch.tensor(1.1).double().item()] * 3]
    assert on_two_ranks(summed) == [expected] * 2


def refused_by_first(rank: int) -> str:
    with pytest.raises(ConfigError) as error:
        from_first(lambda: refuse(ConfigError(f"said by rank {rank}")))
    return str(error.value)


def test_an_error_of_the_first_rank_is_every_ranks(on_two_ranks):
    assert on_two_ranks(refused_by_first) == ["said by rank 0"] * 2


def agreed(rank: int) -> list[Any]:
    return agree((lambda: "done") if rank == 1 else None, None, None)


def test_results_of_an_action_reach_all(on_two_ranks):
    assert on_two_ranks(agreed) == [[None, "done"]] * 2


def refuse(error: Exception) -> None:
    raise error


def failing(rank: int, error: Exception, engine: Engine, **options) -> tuple[type, str, bool]:
    """Return the error on this rank after `error` on rank 1, and whether this rank's engine was ended."""
    with pytest.raises((EngineError, ResyncError)) as raised:
        agree((lambda: refuse(error)) if rank == 1 else None, engine, None, **options)
    return raised.type, str(raised.value), engine.ended


def refusal(rank: int) -> tuple:
    return failing(rank, EngineError("too long"), Engine())


def death(rank: int) -> tuple:
    return failing(rank, EngineError("gone"), Engine(EngineError("gone") if rank == 1 else None))


def broken_transfer(rank: int) -> tuple:
    return failing(rank, TransferError("cut"), Engine(), fatal=TransferError)


def test_what_an_engine_refuses_stops_all_and_ends_none(on_two_ranks):
    assert on_two_ranks(refusal) == [(EngineError, "rank 1: too long", False)] * 2


def test_a_dead_engine_is_ended_and_every_rank_raises(on_two_ranks):
    lost = EngineLostError, "engine of rank 1: gone"
    assert on_two_ranks(death) == [(*lost, False), (*lost, True)]


def test_after_a_fatal_error_every_engine_is_ended(on_two_ranks):
    assert on_two_ranks(broken_transfer) == [(EngineLostError, "engine of rank 1: cut", True)] * 2


def test_without_a_group_a_rank_is_alone():
    here = {"rank": 0}
    assert gather(here) == [here] and broadcast(here) is here and from_first(lambda: here) is here
    assert agree(lambda: 3, None, None) == [3] and reduce([1.5, 2.5], "max") == [1.5, 2.5]
    assert torch.equal(sum_over([torch.ones(2, 3)], "cpu")[0], torch.ones(2, 3).double())
    dead = Engine(EngineError("gone"))
    with pytest.raises(EngineLostError, match="engine of rank 0: gone"):
        agree(lambda: refuse(dead.failure), dead, None)
    assert dead.ended
