"""audit/law.py and audit/tree.py on laws small enough to write down."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from respec_trainer.audit.draws import LawCache
from respec_trainer.audit.ends import Ends, check_switched
from respec_trainer.audit.law import shaped
from respec_trainer.audit.rollouts import rank_classes
from respec_trainer.audit.tree import branches, joint_law
from respec_trainer.rollout.sample import Sample, SamplingParams

LOGITS = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()


@pytest.mark.parametrize(
    ("params", "law"),
    [
        ({"temperature": 1.0}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0.5}, [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
        ({"temperature": 0.0}, [1, 0, 0, 0]),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.75}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.81}, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        ({"top_k": 2, "top_p": 0.6}, [1, 0, 0, 0]),
    ],
)
def test_sampling_parameters_shape_the_law(params, law):
    assert torch.allclose(shaped(LOGITS, SamplingParams(1, **params))[0], torch.tensor(law, dtype=torch.float64))


def draw_pairs(law, count: int, seed: int) -> list[tuple[tuple[int, ...], list[int]]]:
    """Draw responses to (7,) of up to four tokens, each from law(prefix); token 0 ends a response."""
    generator = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        row = [7]
        while len(row) < 5 and row[-1] != 0:
            row.append(int(generator.choice(4, p=law([tuple(row)])[0].numpy())))
        pairs.append(((7,), row[1:]))
    return pairs


def right(prefixes):
    return torch.stack([torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).roll(sum(p) % 3) for p in prefixes])


def wrong_late(prefixes):
    """The law that is right for the first two tokens and wrong after them."""
    moved = torch.tensor([0.0, 0.06, 0.0, -0.06], dtype=torch.float64)
    return torch.stack([right([p])[0] + (moved if len(p) > 2 else 0) for p in prefixes])


def test_branches_count_what_followed_each_prefix():
    pairs = [((7,), [1, 2])] * 50 + [((7,), [1, 3])] * 50 + [((7,), [2])] * 10 + [((8,), [1])] * 5
    assert branches(pairs) == {(7,): {1: 100, 2: 10}, (7, 1): {2: 50, 3: 50}}


def test_a_wrong_joint_law_is_detected():
    pairs = draw_pairs(right, 4000, 0)
    law = LawCache(right)
    assert joint_law(pairs, law).p_value > 0.01
    assert joint_law(pairs, law).p_value == joint_law(pairs, right).p_value
    assert joint_law(draw_pairs(wrong_late, 4000, 0), law).p_value < 1e-6


def test_ranks_are_classed():
    probs = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.25, 0.25]], dtype=torch.float64)
    drawn, masses = rank_classes(probs, torch.tensor([0, 2]))
    assert drawn.tolist() == [2, 2]
    assert torch.allclose(masses, torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.25, 0.25]], dtype=torch.float64))
    drawn, masses = rank_classes(torch.full((1, 10), 0.1, dtype=torch.float64), torch.tensor([9]))
    assert drawn.tolist() == [4] and torch.allclose(masses.sum(), torch.tensor(1.0, dtype=torch.float64))


def test_switching_is_seen():
    def sample(*origins):
        return Sample("k", [1], [5] * len(origins), [0.0] * len(origins), "length", "a", "d", origins=list(origins))

    never = sample(0, 1, 2, 1, 2), sample(0, 0, 0), sample(0, 0, 1, 2)
    assert "never" in check_switched(never).pop()
    assert check_switched([*never, sample(0, 1, 2, 0, 2)]) == set()


class Letters:
    def decode(self, tokens):
        return "".join("abcdefgh"[t] for t in tokens)


@pytest.mark.parametrize(
    ("tokens", "reason", "fault"),
    [
        ([1, 2, 3, 4], "length", None),
        ([1, 0], "stop", None),
        ([1, 5], "stop", None),
        ([3, 1, 2], "stop", "without a reason"),
        ([1, 2, 6], "stop", None),
        ([1, 2, 6, 3], "length", "went on"),
        ([1, 0, 3, 4], "length", "went on"),
        ([1, 2], "length", "cut off"),
        ([1, 2, 3, 4, 1], "length", "longer"),
    ],
)
def test_ends(tokens, reason, fault):
    params = SamplingParams(4, stop=("cg",), stop_token_ids=(5,))
    sample = Sample("k", [1], tokens, [0.0] * len(tokens), reason, "a", "d")
    found = Ends(frozenset([0]), Letters()).fault(sample, params)
    assert (found is None) if fault is None else (fault in found)
