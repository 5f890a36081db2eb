"""drafter/online/fair_sample.py: every row stays with the same probability, whatever its size, and what stays fits."""

from __future__ import annotations

import pytest
import torch

from respec_trainer.drafter.online.fair_sample import FairSample, arc_sizes

SIZES = [900, 40, 40, 40, 200, 310, 7, 120, 55, 640, 33, 90]  # bytes


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(seed: int, sizes=SIZES) -> tuple[list[int], FairSample]:
    return FairSample.draw(sizes, generator(seed))


def largest_arcs(circle: list[int]) -> list[int]:
    """The largest sum of 0, 1, .. n neighbors, with loops."""
    count = len(circle)
    sums = [
        [sum(circle[(start + i) % count] for i in range(arc)) for start in range(count)] for arc in range(count + 1)
    ]
    return [max(some) for some in sums]


@pytest.mark.parametrize("share", [0.1, 1 / 3, 0.5, 11 / 12])
def test_every_row_stays_with_the_same_probability(share):
    """4,000 draws: five standard deviations of a binomial count, for each row, the largest among them."""
    kept, draws = torch.zeros(len(SIZES)), 4000
    for seed in range(draws):
        order, sample = draw(seed)
        kept[order[: sample.count(share)]] += 1
    assert (kept / draws - share).abs().max() < 5 * (share * (1 - share) / draws) ** 0.5


def test_a_smaller_share_is_a_part_of_a_larger_one_and_all_is_all():
    for seed in range(20):
        order, sample = draw(seed)
        counts = [sample.count(share) for share in (0.0, 0.2, 0.21, 0.5, 1.0)]
        assert counts == sorted(counts) and (counts[0], counts[-1]) == (0, 12)
        assert sorted(order) == list(range(12)) and bool((sample.keys.diff() > 0).all())


def test_the_share_that_fits_depends_on_the_sizes_alone_and_always_fits():
    for room in (0, 6, 7, 899, 900, 1000, 1500, 2474, 2475, 9999):
        shares = set()
        for seed in range(200):
            order, sample = draw(seed)
            share = sample.share(room)
            shares.add(share)
            kept = order[: sample.count(share)]
            assert sum(SIZES[index] for index in kept) <= sample.most_bytes(share) <= max(room, 0)
            assert len(kept) == round(share * 12)
        # Rows of equal size, the three of 40, change places on the circle, and nothing else does.
        assert len(shares) == 1
    assert draw(0)[1].share(sum(SIZES)) == 1.0 and draw(0)[1].share(-5) == 0.0


def test_needs_are_those_of_the_worst_arc():
    for seed in range(10):
        order, sample = draw(seed)
        assert sample.needs.tolist() == largest_arcs([SIZES[index] for index in order])
    assert arc_sizes(torch.tensor([5, 1, 7])).tolist() == [0, 7, 12, 13]


def test_no_more_rows_than_the_share_says_for_shares_of_other_ranks():
    """Ranks agree on one share, which is no whole number of this rank's rows."""
    for seed in range(200):
        order, sample = draw(seed)
        for share in (0.13, 0.34, 0.77):
            count = sample.count(share)
            assert int(share * 12) <= count <= int(share * 12) + 1
            assert sum(SIZES[index] for index in order[:count]) <= sample.most_bytes(share)


def test_an_arc_has_rows_of_all_sizes():
    """The 128 rows double in size every 16; any share of a quarter or more has about as many of each half."""
    sizes = [int(100 * 2 ** (row / 16)) for row in range(128)]
    for seed in range(50):
        order, sample = draw(seed, sizes)
        kept = order[: sample.count(0.25)]
        assert len(kept) == 32 and abs(sum(index < 64 for index in kept) - 16) <= 2


def test_rows_of_equal_size_are_in_random_order():
    firsts = {draw(seed, [5] * 8)[0][0] for seed in range(100)}
    pairs = {tuple(draw(seed, [5] * 8)[0][:2]) for seed in range(400)}
    assert firsts == set(range(8)) and len(pairs) > 50  # of 56; without mixing 8 would follow from the circle


def test_no_rows_and_one_row():
    order, sample = draw(0, [])
    assert order == [] and sample.share(0) == 1.0 and sample.count(0.5) == 0 and sample.most_bytes(1.0) == 0
    kept = sum(draw(seed, [10])[1].count(0.3) for seed in range(1000))
    assert draw(0, [10])[1].share(9) == 0.0 and draw(0, [10])[1].share(10) == 1.0
    assert abs(kept - 300) < 5 * (1000 * 0.3 * 0.7) ** 0.5
