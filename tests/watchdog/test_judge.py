"""watchdog/judge.py: which silence, death or hang ends a run, and the message."""

from __future__ import annotations

import socket
import subprocess
from dataclasses import replace

import psutil
import pytest

from respec_trainer.watchdog.ending import RunningClock
from respec_trainer.watchdog.judge import Judge
from respec_trainer.watchdog.messages import (
    MOST_BYTES,
    Answer,
    Beat,
    Process,
    Verdict,
    decode_answer,
    decode_beat,
    encode,
)

LOST, HANG = 10.0, 100.0
ELSEWHERE = "another machine"


def beat(rank: int, **changes) -> Beat:
    """Return a beat; ranks 0 and 1 are on host a, others on host b."""
    process = Process("a" if rank < 2 else "b", ELSEWHERE, 100 + rank, 1.0)
    return replace(Beat(rank, process, "running", step=3, phase="train", moves=20, still=1.0), **changes)


def judge(world: int = 4, now: float = 0.0) -> Judge:
    """Return a judge whose ranks have all met and sent a beat at `now`."""
    made = Judge(range(world), "here", LOST, HANG)
    made.met(now)
    for rank in range(world):
        made.record(beat(rank), now)
    return made


def test_nothing_is_wrong_while_all_send_beats():
    assert judge().decide(LOST) is None and judge().hanging(LOST) is None


def test_a_silent_host_is_named_with_its_ranks_and_where_the_others_are():
    court = judge()
    for rank in (0, 1):
        court.record(beat(rank, step=4, phase="generate"), LOST)
    court.record(beat(3), 0.3 * LOST)  # its last beat came a little later than rank 2's
    assert court.decide(LOST) is None
    verdict = court.decide(LOST + 1)
    assert "ranks 2, 3 on b gave no sign of life for 11 s (run.lost_after)" in verdict.text
    assert "last in phase 'train' of step 3" in verdict.text
    assert verdict.text.splitlines()[1] == "ranks 0, 1 in phase 'generate' of step 4", "the others alone"
    assert [process.pid for process in verdict.lost] == [102, 103]


def test_a_rank_is_done_once_it_says_so():
    court = judge(2)
    court.record(beat(1, state="done"), 1.0)
    assert [court.is_done(rank) for rank in (0, 1, 7)] == [False, True, False]


def test_who_has_finished_or_only_lost_contact_is_not_to_blame():
    court = judge(3)
    court.record(beat(0, state="broken"), 2 * LOST)
    court.record(beat(1, state="done"), 0.0)
    verdict = court.decide(2 * LOST)
    assert verdict.text.startswith("rank 2 on b (process 102) gave no sign")


def test_who_lost_contact_must_still_send_beats():
    court = judge(2)
    court.record(beat(0, state="broken"), 0.0)
    court.record(beat(1), LOST + 1)
    assert court.decide(LOST + 1).text.startswith("rank 0 on a (process 100) gave no sign")


def test_the_most_certain_cause_comes_first():
    """Who says why it failed, then who died, then who is silent, then who was ended by a signal."""
    here = Process.this()
    gone = replace(here, born=here.born - 60)  # another process has its number now
    court = Judge(range(4), here.home, LOST, HANG)
    court.met(0.0)
    hear_all(court, 0.0, beat(0, state="ended", note="signal 15"), beat(1), beat(2, process=gone))
    court.record(beat(3, state="failed", note="ValueError: no"), 0.0)
    late = 2 * LOST
    assert court.decide(late).text.startswith("rank 3 on b (process 103) failed")
    court.record(beat(3), late)
    assert court.decide(late).text.startswith("rank 2 on") and "ended without a message" in court.decide(late).text
    court.record(beat(2, process=gone, state="done"), late)
    assert court.decide(late).text.startswith("rank 1 on a (process 101) gave no sign")
    court.record(beat(1), late)
    assert court.decide(late).text.startswith("rank 0 on a (process 100) ended by signal 15")


def test_who_was_ended_by_a_launcher_is_not_to_blame_unless_nobody_else_is():
    court = judge(3)
    court.record(beat(1, state="ended", note="signal 15"), 1.0)
    for rank in (0, 2):
        court.record(beat(rank), LOST)
    assert court.decide(LOST) is None
    assert "rank 1 on a (process 101) ended by signal 15" in court.decide(LOST + 2).text
    court = judge(3)
    court.record(beat(1, state="ended", note="signal 15"), 1.0)
    court.record(beat(0), LOST + 1)
    assert court.decide(LOST + 1).text.startswith("rank 2")


def test_a_failure_is_reported_at_once():
    court = judge()
    court.record(beat(3, state="failed", note="ValueError: no"), 1.0)
    assert court.decide(1.0).text.startswith(
        "rank 3 on b (process 103) failed in phase 'train' of step 3: ValueError: no"
    )


def test_absent_ranks_have_long_until_the_ranks_have_met_and_little_time_then():
    court = Judge(range(3), "here", LOST, HANG)
    court.record(beat(0), HANG)
    assert court.decide(HANG) is None
    assert "ranks 1, 2 did not come" in court.decide(HANG + 1).text
    court.met(HANG)
    court.record(beat(0), HANG + LOST + 1)
    assert "UDP" in court.decide(HANG + LOST + 1).text


def test_an_earlier_run_s_rank_is_a_stranger_once_all_have_met():
    court = Judge(range(1), "here", LOST, HANG)
    old = beat(0)
    new = replace(old, process=replace(old.process, pid=7))
    assert court.record(old, 0.0) and court.record(new, 0.0)
    court.met(0.0)
    assert not court.record(old, 1.0) and court.record(new, 1.0)


def hear_all(court: Judge, now: float, *beats: Beat) -> None:
    for one in beats:
        court.record(one, now)


def test_the_rank_that_is_behind_hangs():
    court = judge(3)
    stuck = {"still": HANG + 1, "stack": "its stack", "waits": True}
    hear_all(court, 5.0, beat(0, **stuck), beat(1, **stuck | {"moves": 18, "phase": "learn"}), beat(2, **stuck))
    verdict = court.hanging(5.0)
    assert verdict.text.startswith("rank 1 on a (process 101) hangs in phase 'learn' of step 3: 101 s without progress")
    assert "ranks 0, 2 in phase 'train' of step 3" in verdict.text and verdict.text.count("its stack") == 1


def test_of_ranks_in_one_phase_that_hangs_which_is_in_no_collective():
    court = judge(3)
    stuck = {"still": HANG + 1, "stack": "its stack", "waits": True}
    hear_all(
        court, 5.0, beat(0, **stuck), beat(1, **stuck), beat(2, **stuck | {"waits": False, "stack": "sleeps here"})
    )
    verdict = court.hanging(5.0)
    assert verdict.text.startswith("rank 2") and "sleeps here" in verdict.text and "its stack" not in verdict.text


def test_if_all_wait_for_each_other_all_hang():
    court = judge(3)
    hear_all(court, 5.0, *(beat(rank, still=HANG + 1, stack="its stack", waits=True) for rank in range(3)))
    verdict = court.hanging(5.0)
    assert verdict.text.startswith("ranks 0, 1 on a and rank 2 on b (process 102) hang")
    assert [process.pid for process in verdict.lost] == [100, 101, 102]


def test_the_stacks_are_waited_for_but_not_for_ever():
    court = judge(2)
    hear_all(court, 5.0, beat(0, still=HANG + 1), beat(1, still=HANG + 1))
    assert court.hanging(5.0) is None and court.asked_at == 5.0
    assert court.hanging(5.0 + LOST / 2).text.startswith("ranks 0, 1 on a hang")
    hear_all(court, 6.0, beat(0), beat(1))
    assert court.hanging(6.0) is None and court.asked_at is None


def test_a_dead_process_of_this_machine_is_seen_at_once():
    child = subprocess.Popen(["sleep", "60"])
    here = Process.this()
    process = replace(here, pid=child.pid, born=psutil.Process(child.pid).create_time())
    court = Judge(range(2), here.home, LOST, HANG)
    hear_all(court, 0.0, beat(0), beat(1, process=process))
    assert court.decide(0.0) is None
    child.kill()  # its parent does not wait for it: a zombie
    for _ in range(100):
        if verdict := court.decide(0.0):
            break
        subprocess.run(["sleep", "0.05"], check=True)
    child.wait()
    assert verdict.text.startswith(f"rank 1 on {here.host} (process {child.pid}) has ended without a message")
    assert replace(here, born=here.born - 60).here() is None, "another process of the same number"
    assert replace(here, born=here.born - 1.0).here() is replace(here, born=here.born + 1.0).here() is None
    assert here.here().pid == replace(here, born=here.born + 0.9).here().pid == here.pid, "clocks are not that exact"
    assert process.here() is None, "its parent has waited for it, so there is none of its number"


def test_messages_survive_the_way():
    assert (beat(2).note, beat(2).stack, beat(2).waits) == ("", "", False)
    sent = beat(2, note="ä", stack="x" * 4000, waits=True)
    assert decode_beat(encode(sent)) == sent
    answer = Answer(sent, True, Verdict("why", (sent.process,)))
    assert decode_answer(encode(answer)) == answer
    assert decode_answer(encode(Answer(sent))) == Answer(sent) == Answer(sent, stack=False, verdict=None)
    for noise in (b"", b"[]", b"{}", b'{"rank": 1}', b"\xff"):
        with pytest.raises((ValueError, KeyError, TypeError)):
            decode_beat(noise)


def test_a_text_that_is_no_unicode_still_arrives():
    """Messages of errors may hold file names that are no UTF-8, as lone surrogates; without the beat a rank is lost."""
    assert decode_beat(encode(beat(1, note="no file \udcff", stack="\ud800"))) == beat(1, note="no file ?", stack="?")


def test_no_message_is_longer_than_a_datagram():
    """UDP over IPv4 carries 65,507 bytes; sendto would fail, and the rank would be silent without a reason."""
    empty = len(encode(beat(1)))
    longest = encode(beat(1, stack="x" * (MOST_BYTES - empty)))
    assert len(longest) == MOST_BYTES <= 65_507
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver, receiver.dup() as sender:
        receiver.bind(("127.0.0.1", 0))
        assert sender.sendto(longest, receiver.getsockname()) == MOST_BYTES
    for text in ("x" * (MOST_BYTES - empty + 1), "x" * 70_000, "ä" * 35_000):
        with pytest.raises(ValueError, match="bytes does not fit a datagram"):
            encode(beat(1, stack=text))


def test_the_clock_stands_still_while_the_process_does(monkeypatch):
    times = iter([0.0, 1.0, 50.0, 51.0])
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    clock = RunningClock(longest=2.0)
    assert [clock.tick() for _ in range(3)] == [1.0, 3.0, 4.0]
