"""No leak of memory, file handles or ports in two hundred pushes, with engines that leave and join again."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tests.support.configs import smallest_config
from tests.support.processes.ranks import run_ranks
from tests.support.resyncs import greedy, live

pytestmark = pytest.mark.long
PUSHES, BETWEEN_RECONNECTS, WARM = 200, 20, 60


def push_many(config):
    """Return the resources of this process and its engine after WARM pushes, and after PUSHES."""
    seen = []
    with live(config) as setup:
        for number in range(1, PUSHES + 1):
            setup.resync.held = {}
            reports = setup.resync.push()
            assert [r.role for r in reports] == ["target", "draft"]
            if number % BETWEEN_RECONNECTS == 0:
                setup.resync.connect()
            if number in (WARM, PUSHES):
                greedy(setup.fleet)
                seen.append(holdings())
    return seen


def holdings() -> dict[str, int]:
    """Return resident bytes, open files and listening ports of this process and of its children."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listening = [c for p in processes for c in p.net_connections() if c.status == psutil.CONN_LISTEN]
    return {
        "bytes": sum(process.memory_info().rss for process in processes),
        "files": sum(process.num_fds() for process in processes),
        "ports": len(listening),
        "shared": sum(map(shared_memory, processes)),
    }


def shared_memory(process: psutil.Process) -> int:
    """Return the number of shared memory files that this process has mapped or that torch has named after it."""
    mapped = [found for found in process.memory_maps(grouped=False) if found.path.startswith("/dev/shm")]
    return len(mapped) + len(list(Path("/dev/shm").glob(f"torch_{process.pid}_*")))


def test_nothing_is_left_behind(tmp_path, random_pair):
    target, drafter = random_pair
    config = smallest_config(
        tmp_path,
        f"model.path={target}",
        "model.dtype=fp32",
        f"drafter.path={drafter}",
        "speculation.algorithm=eagle3",
        "actor.parallel.tp=2",
        "rollout.engine.span=2",
        "resync.bucket_mb=1",
        "resync.verify=checksum",
    )
    for early, late in run_ranks(2, push_many, config, timeout=240):
        assert late["files"] <= early["files"] and late["ports"] <= early["ports"], (early, late)
        assert late["shared"] <= early["shared"]
        # Allocators need time to become stable: 8 MB is 0.06 MB for each push, a hundredth of what it sends.
        assert late["bytes"] - early["bytes"] < 8 << 20, (early, late)
