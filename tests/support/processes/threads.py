"""Ranks as threads of one process, which agree on the least of their numbers; for code that takes such a function."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

SECONDS = 60.0  # the longest that a rank waits for the others


def together(ranks: int, action: Callable[[int, Callable[[list], list]], Any]) -> list:
    """Run `action(rank, least)` for every rank at the same time and return the results in the order of ranks.

    `least` returns the least of each number of a list over all ranks, which have to call it equally often. It raises
    ValueError if their lists are not equally long.
    """
    said: list[list] = [[] for _ in range(ranks)]
    barrier = threading.Barrier(ranks, timeout=SECONDS)

    def rank_of(rank: int) -> Any:
        def least(values: list) -> list:
            said[rank] = list(values)
            barrier.wait()
            found = [min(column) for column in zip(*said, strict=True)]
            barrier.wait()  # nobody says something new before all have read
            return found

        return action(rank, least)

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(rank_of, range(ranks)))
