"""watchdog/words.py: the messages, word for word."""

from __future__ import annotations

from dataclasses import replace

import pytest

from respec_trainer.watchdog.messages import MOST_CHARACTERS, Beat, Process
from respec_trainer.watchdog.words import (
    GO_ON,
    STACKS_SHOWN,
    absent_text,
    died_text,
    ended_text,
    failed_text,
    hanging_text,
    silent_text,
)


def beat(rank: int, host: str = "a", **changes) -> Beat:
    made = Beat(rank, Process(host, "home", 100 + rank, 1.0), "running", step=3, phase="train", moves=20, still=1.0)
    return replace(made, **changes)


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([4], "rank 4"),
        ([4, 5], "ranks 4, 5"),
        ([4, 6], "ranks 4, 6"),
        ([4, 5, 6], "ranks 4-6"),
        ([0, 2, 3, 4, 5, 9, 10], "ranks 0, 2-5, 9, 10"),
    ],
)
def test_ranks_are_told_in_runs(ranks, words):
    assert absent_text(ranks, 60.4, met=False) == (
        f"{words} did not come within 60 s of the start (run.hang_timeout).\n{GO_ON}"
    )


def test_a_rank_that_met_the_others_but_was_never_heard():
    text = absent_text([1], 30.0, met=True)
    assert text.startswith("rank 1 met the others in a process group, but gave the watchdog no sign within 30 s (run.l")


def test_who_died_where_and_where_the_others_were():
    others = [beat(0, step=4, phase="generate"), beat(1), beat(2, step=4, phase="generate")]
    assert died_text([beat(7, "b")], others) == (
        "rank 7 on b (process 107) has ended without a message, in phase 'train' of step 3.\n"
        f"ranks 0, 2 in phase 'generate' of step 4; rank 1 in phase 'train' of step 3\n{GO_ON}"
    )
    dead = [beat(3, "b"), beat(5, "c"), beat(4, "b", step=2)]
    assert died_text(dead, []) == (
        "ranks 3, 4 on b and rank 5 on c (process 105) have ended without a message, "
        f"in phase 'train' of step 3 and phase 'train' of step 2.\n{GO_ON}"
    )


def test_who_is_silent_for_how_long():
    text = silent_text([beat(1)], 31.4, [beat(0)])
    assert text.startswith(
        "rank 1 on a (process 101) gave no sign of life for 31 s (run.lost_after), last in phase 'tr"
    )
    assert text.endswith(f"\nrank 0 in phase 'train' of step 3\n{GO_ON}")


def test_who_was_ended_or_failed():
    assert ended_text([beat(1, note="signal 15")], []) == (
        f"rank 1 on a (process 101) ended by signal 15 in phase 'train' of step 3.\n{GO_ON}"
    )
    assert failed_text(beat(2, note="ValueError: no  ")) == (
        f"rank 2 on a (process 102) failed in phase 'train' of step 3: ValueError: no\n{GO_ON}"
    )


def test_a_hang_is_told_with_the_longest_time_and_some_stacks():
    hanging = [beat(rank, still=100.0 + rank, stack=f"stack {rank}\n") for rank in range(STACKS_SHOWN + 2)]
    text = hanging_text(hanging, [beat(9, still=300.4)], 60.0)
    assert text.startswith(
        "ranks 0-4 on a hang in phase 'train' of step 3: 300 s without progress (run.hang_timeout 60).\n"
        "rank 9 in phase 'train' of step 3\n"
        "Stack of rank 0, the last call last:\nstack 0\nStack of rank 1,"
    )
    assert "stack 2\n2 more are left out.\n" in text and "stack 3" not in text
    text = hanging_text([hanging[0], beat(1)], [], 60.0)
    assert text.count("Stack of rank") == 1, "a rank whose stack did not come"
    text = hanging_text(hanging[:STACKS_SHOWN], [], 0.5)
    assert text.count("Stack of rank") == STACKS_SHOWN and "left out" not in text and "(run.hang_timeout 0.5)" in text
    assert hanging_text([beat(1)], [], 60.0).startswith("rank 1 on a (process 101) hangs in phase")


def test_a_long_text_keeps_its_beginning_and_the_advice():
    text = failed_text(beat(1, note="x" * 20_000))
    assert len(text) == MOST_CHARACTERS + 1 + len(GO_ON) and text.endswith(f"x\n{GO_ON}")
