"""sgl_kernel/sampling.py: the distribution of the output, by chi-square against the exact one."""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from respec_trainer.rollout.sglang.inside.cpu import put_stand_in_on_path

put_stand_in_on_path()
from sgl_kernel import sampling  # noqa: E402

VOCAB = 5
DRAWS = 40_000
# (parent of each node, token of each node); the walk may accept as many drafts as the tree is deep.
TREES = {
    "root": ([-1], [0]),
    "chain": ([-1, 0, 1, 2], [0, 2, 4, 1]),
    "tree": ([-1, 0, 0, 1, 1, 2, 3], [0, 2, 3, 1, 4, 2, 0]),
    "star": ([-1, 0, 0, 0], [0, 1, 2, 4]),
}


def links(parents):
    n = len(parents)
    child, sibling = torch.full((2, n), -1)
    for i in range(n):
        children = [j for j in range(n) if parents[j] == i]
        if children:
            child[i] = children[0]
            sibling[children] = torch.tensor([*children[1:], -1])
    return child, sibling


def depth(parents) -> int:
    levels = [0]
    for parent in parents[1:]:
        levels.append(levels[parent] + 1)
    return max(levels)


def draw(parents, tokens, probs, draws=DRAWS, seed=0, **thresholds) -> Counter:
    """Count the output sequences of `draws` requests with the same tree."""
    n, width = len(parents), depth(parents) + 1
    generator = torch.Generator().manual_seed(seed)
    predicts = torch.zeros(draws * n, dtype=torch.int32)
    accept_index = torch.full((draws, width), -1, dtype=torch.int32)
    count = torch.empty(draws, dtype=torch.int32)
    index = torch.arange(draws * n).view(draws, n)
    repeated = [x.expand(draws, n) for x in (torch.tensor(tokens), *links(parents))]
    target_probs = probs.expand(draws, n, VOCAB)
    uniform = torch.rand(draws, n, generator=generator), torch.rand(draws, generator=generator)
    sampling.tree_speculative_sampling_target_only(
        predicts, accept_index, count, repeated[0], index, *repeated[1:], *uniform, target_probs,
        torch.zeros_like(target_probs),
        **thresholds,
    )  # fmt: skip
    assert torch.equal((accept_index >= 0).sum(1), count + 1)
    out = predicts[accept_index.clamp(min=0).long()].tolist()
    return Counter(tuple(row[: length + 1]) for row, length in zip(out, count.tolist(), strict=True))


def exact(parents, tokens, probs, node=0, prefix=(), mass=1.0) -> dict[tuple[int, ...], float]:
    """Return the distribution of plain sampling from the target, up to the first token that is no child in the tree."""
    masses: dict[tuple[int, ...], float] = {}
    children = {tokens[j]: j for j in range(len(parents)) if parents[j] == node}
    for token in range(VOCAB):
        share = mass * float(probs[node, token])
        if token in children:
            masses |= exact(parents, tokens, probs, children[token], (*prefix, token), share)
        else:
            masses[(*prefix, token)] = share
    return masses


def p_value(counts: Counter, masses: dict) -> float:
    possible = {key: mass for key, mass in masses.items() if mass > 0}
    assert set(counts) <= set(possible), "an impossible sequence was drawn"
    observed = np.array([counts[key] for key in possible])
    expected = np.array(list(possible.values()))
    return chisquare(observed, expected / expected.sum() * observed.sum()).pvalue


@pytest.mark.parametrize("shape", TREES)
@pytest.mark.parametrize("sparse", [False, True])
def test_output_follows_the_target(shape, sparse):
    parents, tokens = TREES[shape]
    generator = torch.Generator().manual_seed(len(shape))
    probs = torch.rand(len(parents), VOCAB, generator=generator)
    if sparse:  # as after top-k: drafts and other tokens with probability 0
        probs *= torch.rand(probs.shape, generator=generator) < 0.7
        probs[:, 3] += 0.1
    probs /= probs.sum(-1, keepdim=True)
    assert p_value(draw(parents, tokens, probs), exact(parents, tokens, probs)) > 1e-3


def test_the_test_detects_a_wrong_distribution():
    parents, tokens = TREES["tree"]
    probs = torch.full((len(parents), VOCAB), 1 / VOCAB)
    assert p_value(draw(parents, tokens, probs, threshold_acc=0.9), exact(parents, tokens, probs)) < 1e-6


def test_certain_tokens_and_rounding():
    parents, tokens = TREES["star"]
    certain = torch.zeros(4, VOCAB)
    certain[:, 2] = 1
    assert draw(parents, tokens, certain, draws=50) == Counter({(2, 2): 50})
    # The children have all the mass but for rounding. If the uniform number is above it, one of them is still drawn.
    probs = torch.tensor([[0.0, 0.3, 0.3, 0.0, 0.4 - 1e-7]] * 4)
    assert {key[0] for key in draw(parents, tokens, probs, draws=5000)} == {1, 2, 4}


rows = st.lists(st.lists(st.integers(0, 4), min_size=6, max_size=6).filter(any), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(rows, st.integers(1, 6))
def test_top_k(weights, k):
    probs = torch.tensor(weights, dtype=torch.float32)
    probs /= probs.sum(-1, keepdim=True)
    actual = sampling.top_k_renorm_prob(probs, torch.full((len(probs),), k))
    for row, out in zip(probs.numpy(), actual.numpy(), strict=True):
        expected = np.zeros(6)
        best = sorted(range(6), key=lambda i: (-row[i], i))[:k]  # the first of equals, as argmax takes them
        expected[best] = row[best]
        np.testing.assert_allclose(out, expected / expected.sum(), atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(rows, st.sampled_from([0.153, 0.447, 0.713, 0.99, 1.0]))
def test_top_p(weights, top_p):  # no sum of weights is as close to these limits as rounding
    probs = torch.tensor(weights, dtype=torch.float32)
    probs /= probs.sum(-1, keepdim=True)
    actual = sampling.top_p_renorm_prob(probs, torch.full((len(probs),), top_p))
    for row, out in zip(probs.numpy(), actual.numpy(), strict=True):
        expected, held = np.zeros(6), np.float32(0)
        for i in sorted(range(6), key=lambda i: (-row[i], i)):
            if held > np.float32(top_p):
                break
            expected[i] = row[i]
            held += row[i]
        np.testing.assert_allclose(out, expected / expected.sum(), atol=1e-6)


def test_limits_differ_from_row_to_row():
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]])
    assert sampling.top_k_renorm_prob(probs, torch.tensor([1, 3])).count_nonzero(1).tolist() == [1, 3]
    assert sampling.top_p_renorm_prob(probs, torch.tensor([0.4, 0.6])).count_nonzero(1).tolist() == [1, 2]


def test_at_the_very_limit_the_next_token_is_kept():
    """The token is kept as in sglang's own filter, which drops one if the mass before it is larger than top_p."""
    probs = torch.tensor([[0.25, 0.5, 0.25]])
    assert sampling.top_p_renorm_prob(probs, torch.tensor([0.5])).tolist() == [
        [pytest.approx(1 / 3), pytest.approx(2 / 3), 0]
    ]
    assert sampling.top_p_renorm_prob(probs, torch.tensor([0.499])).tolist() == [[0, 1, 0]]


def test_every_sequence_of_the_star_is_possible():
    parents, tokens = TREES["star"]
    masses = exact(parents, tokens, torch.full((4, VOCAB), 1 / VOCAB))
    assert len(masses) == 3 * VOCAB + 2 and abs(sum(masses.values()) - 1) < 1e-6
    assert set(masses) == {(a, b) for a, b in product((1, 2, 4), range(VOCAB))} | {(0,), (3,)}


def rejection(probs, proposals, draws=DRAWS, seed=0) -> Counter:
    """Count the output sequences for chains drawn from `proposals` [n - 1, V]; both depend on the depth only."""
    n, generator = len(probs), torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(proposals, draws, True, generator=generator).T  # [draws, n - 1]
    candidates = torch.nn.functional.pad(drawn, (1, 0))
    predicts = torch.zeros(draws * n, dtype=torch.int32)
    accept_index = torch.full((draws, n), -1, dtype=torch.int32)
    count, index = torch.empty(draws, dtype=torch.int32), torch.arange(draws * n).view(draws, n)
    uniform = torch.rand(draws, n, generator=generator), torch.rand(draws, generator=generator)
    sampling.chain_speculative_sampling(
        predicts, accept_index, count, candidates, index, None, None, *uniform,
        probs.expand(draws, n, VOCAB), proposals.expand(draws, n - 1, VOCAB),
    )  # fmt: skip
    kept = [row[: c + 1] for row, c in zip(accept_index.tolist(), count.tolist(), strict=True)]
    return Counter(tuple(predicts[row].tolist()) for row in kept)


@pytest.mark.parametrize("seed", range(3))
def test_rejection_sampling_keeps_the_distribution_for_any_proposal(seed):
    generator = torch.Generator().manual_seed(100 + seed)
    probs = torch.rand(3, VOCAB, generator=generator).softmax(-1)
    proposals = (4 * torch.rand(2, VOCAB, generator=generator)).softmax(-1)
    sequences = rejection(probs, proposals, seed=seed)
    # A draft is accepted with the mass that both distributions share.
    shared = torch.minimum(probs[:-1], proposals).sum(-1)
    accepted = [sum(c for s, c in sequences.items() if len(s) > depth) / DRAWS for depth in (1, 2)]
    np.testing.assert_allclose(accepted, shared.cumprod(0), atol=0.01)  # 40,000 draws
    for depth in range(3):
        seen = Counter()
        for sequence, times in sequences.items():
            if len(sequence) > depth:
                seen[sequence[depth]] += times
        expected = probs[depth].double() / probs[depth].double().sum() * seen.total()
        assert chisquare([seen[token] for token in range(VOCAB)], expected).pvalue > 1e-3


def test_a_proposal_equal_to_the_target_is_always_accepted():
    probs = torch.tensor([[0.5, 0.2, 0.2, 0.1, 0.0]]).expand(4, VOCAB)
    assert {len(sequence) for sequence in rejection(probs, probs[:-1], draws=500)} == {4}


def verify(parents, tokens, probs, uniform, last=0.5, **thresholds) -> list[int]:
    """Return the output of one request whose uniform numbers are given."""
    n, width = len(parents), depth(parents) + 1
    predicts, accept_index = torch.zeros(n, dtype=torch.int32), torch.full((1, width), -1, dtype=torch.int32)
    count = torch.empty(1, dtype=torch.int32)
    request = [x[None] for x in (torch.tensor(tokens), torch.arange(n), *links(parents), torch.tensor(uniform))]
    probs = torch.tensor(probs).expand(1, n, VOCAB)
    sampling.tree_speculative_sampling_target_only(
        predicts, accept_index, count, *request, torch.tensor([last]), probs, probs, **thresholds
    )
    return predicts[accept_index[0, : int(count) + 1].long()].tolist()


@pytest.mark.parametrize("shape", TREES)
def test_a_token_without_mass_is_never_drawn_even_by_the_number_zero(shape):
    parents, tokens = TREES[shape]
    out = verify(parents, tokens, [0.0, 0.0, 0.0, 0.75, 0.25], [0.999] * len(parents), last=0.0)
    assert out[-1] in (3, 4)
    assert verify([-1], [0], [0.0, 0.5, 0.0, 0.5, 0.0], [0.5], last=0.5) == [3], "0.5 belongs to the upper half"


@pytest.mark.parametrize("shape", ["chain", "star"])
def test_a_single_threshold_accepts_drafts_of_at_least_that_probability(shape):
    parents, tokens = TREES[shape]  # the root's first child is token 2 in the chain, and token 1 in the star
    probs = [0.0, 0.25, 0.25, 0.25, 0.25]
    too_large = [0.999] * len(parents)
    exact_output = verify(parents, tokens, probs, too_large)
    accepted = verify(parents, tokens, probs, too_large, threshold_single=0.25)
    assert exact_output[0] not in tokens[1:2] or shape == "star"
    assert accepted[0] == tokens[1] and len(accepted) == depth(parents) + 1
    assert verify(parents, tokens, probs, too_large, threshold_single=0.26) == exact_output


@pytest.mark.parametrize("shape", ["chain", "star"])
def test_a_number_equal_to_a_draft_s_probability_is_outside_of_it(shape):
    """Numbers are drawn from [0, 1): those below p are a share of p of them, and none is below 0."""
    parents, tokens = TREES[shape]
    draft = tokens[1]
    for p, uniform, accepted in ((0.25, 0.25, False), (0.25, 0.2499, True), (0.0, 0.0, False)):
        probs = [0.0] * VOCAB
        probs[3], probs[draft] = 1 - p, p  # token 3 is no child of the root
        out = verify(parents, tokens, probs, [uniform, *[0.999] * (len(parents) - 1)])
        assert out[0] == (draft if accepted else 3) and len(out) == 1 + accepted


def verify_chain(probs, proposals, uniform, tokens, last=0.5) -> list[int]:
    """Return the output of one chain of drafts whose uniform numbers are given."""
    n = len(tokens)
    predicts, accept_index = torch.zeros(n, dtype=torch.int32), torch.full((1, n), -1, dtype=torch.int32)
    count = torch.empty(1, dtype=torch.int32)
    request = [torch.tensor(tokens)[None], torch.arange(n)[None], None, None, torch.tensor(uniform)[None]]
    given = torch.tensor(probs).expand(1, n, VOCAB), torch.tensor(proposals).expand(1, n - 1, VOCAB)
    sampling.chain_speculative_sampling(predicts, accept_index, count, *request, torch.tensor([last]), *given)
    return predicts[accept_index[0, : int(count) + 1].long()].tolist()


def test_rejection_sampling_at_its_bounds():
    probs, proposals = [0.0, 0.25, 0.5, 0.25, 0.0], [0.5, 0.5, 0.0, 0.0, 0.0]
    # A draft is accepted if u * q < p: here below 0.25 / 0.5.
    assert verify_chain(probs, proposals, [0.5, 0.0], [4, 1]) == [2], "then max(p - q, 0) is 0.5 and 0.25"
    assert verify_chain(probs, proposals, [0.4999, 0.0], [4, 1]) == [1, 2]
    assert verify_chain(probs, proposals, [0.0, 0.0], [4, 2]) == [2], "not accepted: the drafter cannot have drawn it"
    assert verify_chain(probs, proposals, [0.0, 0.0], [4, 0], last=0.99) == [3]
    assert verify_chain(probs, proposals, [0.0, 0.0, 0.0], [4, 1, 1], last=0.0) == [1, 1, 1], "all accepted: from p"


def test_an_accumulated_threshold_divides_the_mass():
    probs = [0.25, 0.25, 0.25, 0.25, 0.0]
    for uniform, threshold, accepted in ((0.27, 0.9, True), (0.28, 0.9, False), (0.27, 1.0, False)):
        out = verify([-1, 0], [4, 2], probs, [uniform, 0.0], threshold_acc=threshold)
        assert (out[0] == 2 and len(out) == 2) == accepted  # 0.25 / 0.9 is 0.277...


def test_if_the_rejected_tokens_had_all_the_mass_the_most_probable_is_drawn():
    probs = torch.tensor([[0.0, 0.3, 0.5, 0.2, 0.0]])
    rest = sampling.draw_rest(
        probs, torch.tensor([[4, 1, 2, 3]]), torch.tensor([[False, True, True, True]]), torch.zeros(1)
    )
    assert rest.tolist() == [2] and probs.tolist() == [[0.0, pytest.approx(0.3), 0.5, pytest.approx(0.2), 0.0]]
