"""The watchdog on real processes that connect over gloo: a death, stop, hang or failure ends all, with one message."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import psutil
import pytest

from respec_trainer.network import free_port
from tests.support.processes import forking
from tests.support.processes.watched_rank import live

LOST_AFTER = 6.0  # longer than a busy machine may delay a thread
HANG_TIMEOUT = 10.0  # longer than the start, which counts as a phase too
PATIENCE = 60.0
FIRST_BEATS = 2.0


class WatchedRanks:
    """Start ranks without a launcher, which would end the others, as forks that have done their imports."""

    def __init__(self, world: int, folder: Path, victim: int = -1, fault: str = "none", hang_timeout: float = 600.0):
        self.folder, self.stop_file = folder, folder / "stop"
        self.began: float = 0.0
        shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        environment = os.environ | shared | {"STOP_FILE": str(self.stop_file), "OMP_NUM_THREADS": "1"}
        fork = multiprocessing.get_context("forkserver").Process
        self.ranks = []
        for rank in range(world):
            output = [folder / f"{rank}.{kind}" for kind in ("out", "err")]
            for file in output:
                file.touch()  # it is read before the rank has begun
            settings = victim, fault, LOST_AFTER, hang_timeout
            with forking.ranks.in_charge():
                self.ranks.append(fork(target=live, args=(environment | {"RANK": str(rank)}, *output, *settings)))
                self.ranks[-1].start()

    def wait_until_met(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while not all("ready" in self.output(rank, "out") for rank in range(len(self.ranks))):
            assert time.monotonic() < deadline, self.outputs()
            time.sleep(0.1)
        time.sleep(FIRST_BEATS)  # on a fast machine ranks meet before their watchdogs have exchanged beats
        self.pids = [[int(pid) for pid in self.output(r, "out").split()[1:3]] for r in range(len(self.ranks))]
        self.began = time.monotonic()

    def signal(self, rank: int, number: int) -> None:
        self.began = time.monotonic()
        os.kill(self.ranks[rank].pid, number)

    def ended(self, but: tuple[int, ...] = ()) -> list[int | None]:
        """Wait until all ranks `but` those have ended; return the exit codes."""
        for rank, process in enumerate(self.ranks):
            if rank not in but:
                process.join(max(0.1, PATIENCE - (time.monotonic() - self.began)))
        self.seconds = time.monotonic() - self.began
        return [process.exitcode for process in self.ranks]

    def output(self, rank: int, kind: str = "err") -> str:
        return (self.folder / f"{rank}.{kind}").read_text()

    def outputs(self) -> str:
        return "".join(self.output(rank) for rank in range(len(self.ranks)))

    def orphans(self) -> list[int]:
        return [child for _, child in self.pids if is_running(child)]

    def close(self) -> None:
        for process in self.ranks:
            children = psutil.Process(process.pid).children() if process.is_alive() else []
            for survivor in (*children, process):
                survivor.kill()
            process.join()


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.fixture
def watched(tmp_path):
    started = []

    def start(world: int, *args, **options) -> WatchedRanks:
        started.append(WatchedRanks(world, tmp_path, *args, **options))
        started[-1].wait_until_met()
        return started[-1]

    yield start
    for ranks in started:
        ranks.close()


def check_told_once(ranks: WatchedRanks, *words: str) -> None:
    """Check that there is one message, with `words` in it, and no traceback of ranks that only lost contact."""
    told = ranks.outputs()
    assert told.count("error: ") == 1 and "Traceback" not in told, told
    for word in (*words, socket.gethostname(), "if started again it resumes"):
        assert word in told, f"{word!r} not in {told}"


def test_a_run_that_ends_well_says_nothing(watched):
    ranks = watched(2)
    ranks.stop_file.touch()
    assert ranks.ended() == [0, 0] and ranks.outputs() == ""


def test_a_rank_that_sleeps_in_a_collective_is_named_with_phase_and_stack(watched):
    ranks = watched(3, victim=1, fault="sleep", hang_timeout=HANG_TIMEOUT)
    assert all(ranks.ended())
    check_told_once(ranks, "rank 1 on", "hangs in phase 'train' of step 3", "ranks 0, 2 in phase 'train' of step 3")
    assert "in sleep_in_a_collective" in ranks.outputs() and ranks.outputs().count("Stack of rank") == 1
    assert ranks.seconds < HANG_TIMEOUT + PATIENCE / 2 and not ranks.orphans()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named_at_once(watched, victim):
    ranks = watched(2)
    ranks.signal(victim, signal.SIGKILL)
    assert ranks.ended()[1 - victim] == 1
    check_told_once(ranks, f"rank {victim} on", f"(process {ranks.pids[victim][0]})", "ended without a message")
    assert ranks.seconds < LOST_AFTER + 10
    assert ranks.orphans() == [ranks.pids[victim][1]], "its own child is its own: sleep has no eye on its parent"
    os.kill(ranks.pids[victim][1], signal.SIGKILL)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_is_missed_and_killed(watched, victim):
    ranks = watched(2)
    ranks.signal(victim, signal.SIGSTOP)
    assert ranks.ended()[victim] == -signal.SIGKILL
    check_told_once(ranks, f"rank {victim} on", "gave no sign of life for", "run.lost_after")
    assert LOST_AFTER < ranks.seconds < LOST_AFTER + 30 and not ranks.orphans()


def test_an_error_of_one_rank_ends_the_others_and_is_printed_by_that_rank(watched):
    ranks = watched(2, victim=1, fault="raise")
    assert ranks.ended() == [1, 1]
    assert "ValueError: a planted fault" in ranks.output(1) and "Traceback" in ranks.output(1)
    assert ranks.output(0) == "" and not ranks.orphans()


def test_a_terminated_rank_ends_the_run(watched):
    ranks = watched(2)
    ranks.signal(1, signal.SIGTERM)
    assert ranks.ended() == [1, 128 + signal.SIGTERM] and not ranks.orphans()
    check_told_once(ranks, "rank 1 on", "ended by signal 15")
