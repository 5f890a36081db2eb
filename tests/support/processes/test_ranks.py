"""The helper that runs functions on ranks must not hide an error on one of them."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.support.processes.ranks import Ranks, run_ranks


def add_up(factor: int) -> torch.Tensor:
    dist.init_process_group("gloo")
    total = torch.tensor([dist.get_rank() + 1])
    dist.all_reduce(total)
    return total * factor


def fail_on_one() -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        raise ValueError("a fault of rank 1")
    dist.barrier()


def die_on_one() -> None:
    if os.environ["RANK"] == "1":
        os._exit(7)


def hang_on_one() -> None:
    if os.environ["RANK"] == "0":
        time.sleep(60)


def test_results_come_in_rank_order_and_processes_are_used_again():
    pool = Ranks(2)  # those of other tests may have so many threads by now that they are replaced
    try:
        first = pool.call(os.getpid, (), 120.0)
        assert [t.item() for t in pool.call(add_up, (2,), 120.0)] == [6, 6]
        assert pool.call(os.getpid, (), 120.0) == first
    finally:
        pool.close()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (fail_on_one, "rank 1: Traceback.*a fault of rank 1"),
        (die_on_one, "rank 1: died with exit code 7"),
        (hang_on_one, "rank 0: no answer;.*hang_on_one"),
    ],
)
def test_failures_name_their_rank_and_the_next_call_works(function, message):
    with pytest.raises(AssertionError, match=f"(?s){message}"):
        run_ranks(2, function, timeout=10.0 if function is not hang_on_one else 1.0)
    assert [t.item() for t in run_ranks(2, add_up, 1)] == [3, 3]
