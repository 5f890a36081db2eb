"""speculation/endings.py: what responses keep of each cycle, against responses drawn token by token."""

from __future__ import annotations

import json
import random

import pytest

from respec_trainer.rollout.ends import Ends
from respec_trainer.speculation.endings import Endings, tokens_beyond

ACCEPTANCE = (0.8, 0.7, 0.6)


def draw(lengths: list[int], steps: int, behind: float, seed: int = 0) -> list[tuple[int, int, bool]]:
    """Draw responses alone; return (verified, kept, ended) of every cycle. `behind`: acceptance behind an end."""
    generator, cycles = random.Random(seed), []
    for length in lengths:
        left = length
        while left > 0:
            verified = 1
            for depth in range(steps):
                if generator.random() >= (ACCEPTANCE[min(depth, 2)] if verified < left else behind):
                    break
                verified += 1
            cycles.append((verified, min(verified, left), verified >= left))
            left -= verified
    return cycles


def run_of(generator: random.Random, steps: int, share: float) -> int:
    """Draw the tokens of one cycle."""
    return 1 + next((depth for depth in range(steps) if generator.random() >= share), steps)


def acceptance_of(cycles: list[tuple[int, int, bool]], steps: int) -> list[float]:
    """The acceptance by depth of all that was verified, behind ends too, as engines count it."""
    reached = [sum(verified > depth for verified, _, _ in cycles) for depth in range(steps + 1)]
    return [after / before for before, after in zip(reached, reached[1:], strict=False)]


def learnt(cycles: list[tuple[int, int, bool]], expected: float, over: bool = False) -> Endings:
    """The estimates from all cycles; with `over` each response is computed once more after its end."""
    endings = Endings(memory=1e9)
    for verified, kept, ended in cycles:
        endings.observe(verified, Ends(kept, int(ended), 0), expected)
        if ended and over:
            endings.observe(0, Ends(0, 0, 1), expected)
    return endings


def test_the_mean_excess_by_hand():
    """Runs of 1 and of 2 tokens, half each: an end in a run of 2, of which it hits one token of two, leaves half."""
    assert tokens_beyond(0, [0.5]) == 0.0 and tokens_beyond(1, [0.5]) == pytest.approx(2 / 3 * 1 / 2)
    assert tokens_beyond(3, [1.0]) == pytest.approx((0 + 1 + 2 + 3) / 4), "always four tokens"
    assert tokens_beyond(3, [1.0, 0.5]) == pytest.approx((1 + 2 * 0.5 + 3 * 0.25) / 2.75), "deeper is like the last"


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_ends_fall_into_long_runs_more_often(steps):
    """The excess behind responses of widely different lengths, whose drafts are kept alike behind the end."""
    generator, excess = random.Random(1), 0
    for _ in range(20_000):
        left = generator.randint(20, 120)
        while left > 0:
            left -= run_of(generator, steps, 0.6)
        excess -= left
    assert excess / 20_000 == pytest.approx(tokens_beyond(steps, [0.6]), rel=0.03)


@pytest.mark.parametrize("behind", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("over", [False, True])
def test_what_is_kept_agrees_with_what_responses_kept(behind, over):
    """Within 1 %, on short responses, however often drafts behind an end are kept."""
    generator = random.Random(2)
    cycles = draw([generator.randint(5, 50) for _ in range(5000)], 3, behind)
    acceptance = acceptance_of(cycles, 3)
    endings = learnt(cycles, tokens_beyond(3, acceptance), over)
    computed = len(cycles) + 5000 * over
    expected = sum(kept for _, kept, _ in cycles) / computed
    plain, found = endings.kept_by_steps([0, 3], acceptance)
    assert found == pytest.approx(expected, rel=0.01)
    if behind > 0.5 or over:
        verified = sum(verified for verified, _, _ in cycles) / len(cycles)
        assert verified > 1.02 * expected, "otherwise there is nothing to tell"
    if not over:
        assert plain == 1.0, "plain decoding draws nothing behind an end"


def test_other_numbers_of_steps_are_foreseen():
    """Estimates from five steps hold for two, and for none where finished sequences are computed again."""
    lengths = [random.Random(seed).randint(5, 50) for seed in range(5000)]
    acceptance = [0.7]

    def cycles_of(steps: int) -> list[tuple[int, int, bool]]:
        generator, found = random.Random(3), []
        for length in lengths:
            left = length
            while left > 0:
                run = run_of(generator, steps, 0.7)
                found.append((run, min(run, left), run >= left))
                left -= run
        return found

    seen = cycles_of(5)
    endings = learnt(seen, tokens_beyond(5, acceptance), over=True)
    found = dict(zip((0, 2, 4), endings.kept_by_steps([0, 2, 4], acceptance), strict=True))
    for steps, kept in found.items():
        cycles = cycles_of(steps)
        expected = sum(kept for _, kept, _ in cycles) / (len(cycles) + len(lengths))
        assert kept == pytest.approx(expected, rel=0.01)


def test_without_ends_all_is_kept():
    endings = Endings()
    endings.observe(40, Ends(40, 0), 0.0)
    assert endings.kept_by_steps([0, 2], [1.0]) == [1.0, 3.0]


def test_old_ends_count_less():
    """The short responses before many long ones are forgotten."""
    endings = Endings(memory=50)
    for length in [4] * 200 + [1000] * 200:
        endings.observe(length, Ends(length, 1), 0.0)
    assert endings.ended / endings.kept == pytest.approx(1 / 1000, rel=0.1)


def test_tokens_do_not_age_what_was_seen():
    """A long response takes many batches to end, and weighs no more or less for it."""
    endings = Endings(memory=10)
    for _ in range(1000):
        endings.observe(64, Ends(64, 0), 0.0)
    assert endings.kept == 64_000


def test_a_state_comes_back_from_json():
    endings = learnt(draw([30] * 10, 3, 0.5), 1.0, over=True)
    other = Endings()
    other.load_state(json.loads(json.dumps(endings.state())))
    assert other.state() == endings.state()
    assert other.kept_by_steps([0, 3], [0.5]) == endings.kept_by_steps([0, 3], [0.5]) != [1.0, 1.875]
