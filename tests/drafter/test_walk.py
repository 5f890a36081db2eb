"""drafter/walk.py: verify passes along responses, against a loop over passes."""

from __future__ import annotations

import torch

from respec_trainer.drafter.walk import pass_tokens, verify_passes


def loop(hits, mask, steps: int) -> list[int]:
    """Count the passes of each row with a loop, one pass after the other."""
    counts = []
    for row, own in zip(hits.tolist(), mask.tolist(), strict=True):
        known = own.index(True) if True in own else len(own)  # the response's first token came with the prompt
        end, passes = known + sum(own), 0
        while known < end - 1:
            start, passes = known - 1, passes + 1
            for k in range(steps):
                if not row[start][k]:
                    break
                known += 1
            known += 1  # drawn by the pass
        counts.append(passes)
    return counts


def random_case(seed: int, rows=40, width=30, depths=4):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(rows, width, dtype=torch.bool)
    hits = torch.rand(rows, width, depths, generator=generator) < 0.3 + 0.2 * seed
    for row in range(rows):
        first = int(torch.randint(1, 10, (), generator=generator))
        end = first + int(torch.randint(0, width - first + 1, (), generator=generator))
        mask[row, first:end] = True
        for t in range(width):
            for k in range(depths):
                hits[row, t, k] &= t + 2 + k < end  # only response tokens can be hits
    return hits, mask


def test_passes_are_those_of_a_walk():
    for seed in range(4):
        hits, mask = random_case(seed)
        got = verify_passes(hits, mask)
        for steps in range(1, 5):
            assert got[:, steps - 1].tolist() == loop(hits, mask, steps)


def test_a_response_by_hand():
    # x_0 x_1 the prompt, x_2 .. x_8 the response: x_2 comes with the prompt.
    mask = torch.tensor([[False] * 2 + [True] * 7 + [False]])
    hits = torch.zeros(1, 10, 2, dtype=torch.bool)
    hits[0, 1] = torch.tensor([True, True])  # x_3 and x_4 are hit, x_5 is drawn
    hits[0, 4] = torch.tensor([False, True])  # x_6 is missed and drawn: drafts after a miss do not count
    hits[0, 5] = torch.tensor([True, True])  # x_7 and x_8 are hit, and the response ends
    # One draft a pass: x_3 x_4 from 1, x_5 from 3, x_6 from 4, x_7 x_8 from 5.
    assert verify_passes(hits, mask).tolist() == [[4, 3]]
    assert pass_tokens(mask).tolist() == [6]


def test_no_response_and_one_of_one_token_take_no_pass():
    mask = torch.tensor([[False] * 5, [False, True, False, False, False], [False] * 4 + [True]])
    assert verify_passes(torch.zeros(3, 5, 3, dtype=torch.bool), mask).tolist() == [[0] * 3] * 3
    assert pass_tokens(mask).tolist() == [0, 0, 0]


def test_without_hits_every_token_is_a_pass_and_with_all_of_them_every_s_plus_one():
    mask = torch.tensor([[False] + [True] * 25])
    missed = torch.zeros(1, 26, 3, dtype=torch.bool)
    assert verify_passes(missed, mask).tolist() == [[24, 24, 24]]
    ends = torch.arange(26)[:, None] + 2 + torch.arange(3) < 26
    assert verify_passes(ends[None], mask).tolist() == [[12, 8, 6]]
