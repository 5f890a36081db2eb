"""audit/tree.py on laws small enough to write down."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chi2, chisquare

from respec_trainer.audit.law import Laws
from respec_trainer.audit.tree import PREFIXES_A_PASS, joint_law, token_scores, tree_of


def laws_of(law):
    """Wrap a function prefix -> probabilities [V]."""

    def laws_after(prefixes) -> Laws:
        probs = torch.tensor([law(prefix) for prefix in prefixes], dtype=torch.float64)
        return Laws(probs, torch.ones_like(probs, dtype=torch.bool))

    return laws_after


def draw_pairs(law, count: int, seed: int) -> list[tuple[tuple[int, ...], list[int]]]:
    """Draw responses to (7,) of up to four tokens, each from law(prefix); token 0 ends a response."""
    generator = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        row = [7]
        while len(row) < 5 and row[-1] != 0:
            row.append(int(generator.choice(4, p=law(tuple(row)))))
        pairs.append(((7,), row[1:]))
    return pairs


def right(prefix):
    return np.roll([0.4, 0.3, 0.2, 0.1], sum(prefix) % 3)


def wrong_late(prefix):
    """The law that is right for the first two tokens and wrong after them."""
    return right(prefix) + (np.array([0.0, 0.06, 0.0, -0.06]) if len(prefix) > 2 else 0)


def test_the_tree_counts_what_followed_each_prefix():
    pairs = [((7,), [1, 2])] * 50 + [((7,), [1, 3])] * 50 + [((7,), [2])] * 10 + [((8,), [1])] * 5
    assert tree_of(pairs) == {(7,): {1: 100, 2: 10}, (7, 1): {2: 50, 3: 50}, (8,): {1: 5}}


def test_the_statistic_adds_up_those_of_the_prefixes_that_40_reached():
    pairs = draw_pairs(right, 4000, 0)
    tree = tree_of(pairs)
    often = {prefix: seen for prefix, seen in tree.items() if seen.total() >= 40}
    # Every outcome of these has 5 expected draws or more, but for prefixes with fewer than 50 draws.
    assert all(seen.total() * 0.1 >= 5 for seen in often.values()) and len(often) > 20
    parts = [chisquare([seen[t] for t in range(4)], seen.total() * right(prefix)) for prefix, seen in often.items()]
    evidence = joint_law(tree, laws_of(right))
    assert evidence.statistic == pytest.approx(sum(part.statistic for part in parts))
    assert evidence.df == 3 * len(often) + 1 and evidence.draws == sum(seen.total() for seen in often.values())
    assert evidence.p_value == pytest.approx(chi2.sf(evidence.statistic, evidence.df))


def test_a_prefix_counts_from_40_draws_on():
    pairs = [((7,), [1, 1])] * 39 + [((7,), [2, 1])] * 40

    def only(prefix):
        return [0.5, 0.5, 0, 0] if prefix == (7, 2) else [0, 39 / 79, 40 / 79, 0]

    assert joint_law(tree_of(pairs), laws_of(only)).df == 3  # the prompt, (7, 2), and the rare outcomes
    assert joint_law(tree_of(pairs), laws_of(only)).draws == 79 + 40


def test_a_wrong_joint_law_is_detected():
    pairs, wrong = tree_of(draw_pairs(right, 4000, 0)), tree_of(draw_pairs(wrong_late, 4000, 0))
    assert joint_law(pairs, laws_of(right)).p_value > 0.01
    assert joint_law(wrong, laws_of(right)).p_value < 1e-6


def test_scores_are_those_of_all_tokens_also_after_rare_prefixes():
    pairs = draw_pairs(right, 3000, 1) + [((9, index), [1, 2]) for index in range(PREFIXES_A_PASS)]
    sums = token_scores(tree_of(pairs), laws_of(right)).whole
    ranks, difference, tokens = (0, 1, 2, 3), np.zeros(4), 0
    for prompt, response in pairs:
        row = list(prompt)
        for token in response:
            law = right(tuple(row))
            order = sorted(range(4), key=lambda token: -law[token])
            difference += np.eye(4)[order.index(token)] - law[order]
            row.append(token)
            tokens += 1
    assert np.allclose(sums.difference[list(ranks)], difference) and sums.draws == tokens
    assert sums.reached == pytest.approx(tokens)
    assert sums.ratio == pytest.approx(0, abs=1e-9)


def test_impossible_tokens_are_proof():
    pairs = tree_of([((7,), [1])] * 50 + [((7,), [2])] * 49 + [((7,), [3])])
    assert joint_law(pairs, laws_of(lambda prefix: [0.0, 0.5, 0.5, 0.0])).p_value == 0
