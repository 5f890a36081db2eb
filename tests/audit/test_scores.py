"""audit/scores.py against sums over every token, written as loops, and on draws of engines that round differently."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from respec_trainer.audit.law import Laws, laws
from respec_trainer.audit.scores import Draws, Strata, strata
from respec_trainer.rollout.sample import SamplingParams

VOCAB = 12
PLAIN = SamplingParams(1)


def sums_of(some: Laws, draws: Draws):
    """The sums over all draws."""
    return strata(some, draws).whole


def random_logits(rows: int, seed: int, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def score_table(law: np.ndarray) -> np.ndarray:
    """The scores of every token, [V, 6]: classes of the ranks 1, 2, 3, 4 to 8, 9 and more, and the surprisal."""
    table = np.zeros((len(law), 6))
    for rank, token in enumerate(sorted(range(len(law)), key=lambda token: -law[token])):
        table[token, [0, 1, 2, 3, 3, 3, 3, 3, 4][min(rank, 8)]] = 1
        table[token, 5] = min(16.0, -math.log(law[token])) if law[token] else 16.0
    return table


def every_token_once(probs: torch.Tensor, sampler: torch.Tensor) -> Draws:
    """Draws that are as frequent as the sampler makes them: sums over them are expectations."""
    rows, tokens = sampler.nonzero(as_tuple=True)
    counts = sampler[rows, tokens]
    return Draws(rows, tokens, counts, probs[rows, tokens] / counts)


def test_scores_of_draws_are_those_of_a_loop():
    some = laws(random_logits(3, 0), PLAIN)
    drawn = [(0, 4, 2, 1.0), (1, 7, 1, 0.5), (1, 0, 3, 2.0), (2, 11, 1, 1.5)]
    rows, tokens, counts, ratios = map(torch.tensor, zip(*drawn, strict=True))
    sums = sums_of(some, Draws(rows, tokens, counts.double(), ratios.double()))
    difference, expected, excess, fourth, ratio = np.zeros(6), np.zeros((6, 6)), np.zeros((6, 6)), 0.0, 0.0
    for row, token, count, rho in drawn:
        law = some.probs[row].numpy()
        away = score_table(law) - law @ score_table(law)
        difference += count * rho * away[token]
        expected += count * (away.T * law) @ away
        excess += count * (rho**2 - rho) * np.outer(away[token], away[token])
        fourth += count * law @ away[:, 5] ** 4
        ratio += count * (rho - 1)
    assert np.allclose(sums.difference, difference) and np.allclose(sums.expected, expected)
    assert np.allclose(sums.excess, excess) and np.allclose([sums.fourth, sums.ratio], [fourth, ratio])
    assert sums.ratio_square == pytest.approx(0.5**2 + 3 * 1 + 0.5**2) and sums.draws == 7
    sizes = [(3 * 2.0**4) + 0.25**4 + 0.75**4] * 5
    assert np.allclose(sums.largest[:5], sizes)


def test_the_largest_increment_of_the_surprisal_is_kept():
    some = laws(random_logits(1, 5), PLAIN)
    away = score_table(some.probs[0].numpy())[3, 5] - float((some.probs[0] * -some.probs[0].log()).sum())
    one = torch.tensor([1.0], dtype=torch.float64)
    sums = sums_of(some, Draws(torch.tensor([0]), torch.tensor([3]), one, 3 * one))
    assert sums.largest[5] == pytest.approx((6 * away**2) ** 4)


@pytest.mark.parametrize("params", [PLAIN, SamplingParams(1, top_p=0.8), SamplingParams(1, top_k=4)])
@pytest.mark.parametrize("error", [0.05, 0.4])
def test_scores_have_mean_zero_and_the_covariance_whatever_the_sampler_rounds(params, error):
    """The sums over all tokens, as frequent as the sampler draws them; its top_p and top_k keep other tokens."""
    logits = random_logits(300, 1, scale=1.5)
    actor, sampler = laws(logits, params), laws(logits + random_logits(300, 2, error / 2), params)
    # The claim is for samplers that agree about the odds up to a factor of 3.
    agree = (
        (logits.log_softmax(1) - sampler.probs.log()).masked_fill(sampler.probs == 0, 0).abs() < math.log(3) / 2
    ).all(1)
    cut = ((actor.probs > 0) & (sampler.probs == 0)).any(1)
    assert params == PLAIN or (cut & agree).any(), "nothing was cut differently"
    sums = sums_of(actor, every_token_once(actor.probs, sampler.probs))
    assert np.abs(sums.difference).max() < 1e-9
    second = np.zeros((6, 6))
    for law, kept, other in zip(actor.probs.numpy(), actor.certain.numpy(), sampler.probs.numpy(), strict=True):
        inside = law * kept
        away = (score_table(law) - inside @ score_table(law) / max(inside.sum(), 1e-12)) * kept[:, None]
        rho = np.divide(law, other, out=np.zeros_like(law), where=other > 0)
        second += (away.T * (other * rho**2)) @ away
    assert np.allclose(sums.expected + sums.excess, second)


def test_draws_are_summed_apart_by_whether_the_actor_is_uncertain():
    """Among the certain tokens of the last law only one is left."""
    probs = torch.tensor([[0.98, 0.01, 0.01], [0.96, 0.02, 0.02], [0.5, 0.3, 0.2]], dtype=torch.float64)
    certain = torch.tensor([[True] * 3, [True] * 3, [True, False, False]])
    draws = Draws(
        torch.tensor([0, 1, 2]), torch.tensor([0, 0, 0]), torch.tensor([5.0, 7.0, 9.0]).double(), torch.ones(3).double()
    )
    sums = strata(Laws(probs, certain), draws)
    assert (sums.uncertain.draws, sums.sure.draws, sums.whole.draws) == (7, 14, 21)
    assert sums.uncertain.reached == 7 and sums.sure.reached == pytest.approx(5 + 4.5)
    assert sums.uncertain.difference[0] == pytest.approx(7 * 0.04) and sums.sure.difference[0] == pytest.approx(
        5 * 0.02
    )
    assert sums.uncertain.expected[0, 0] == pytest.approx(7 * 0.96 * 0.04)
    assert sums.sure.expected[0, 0] == pytest.approx(5 * 0.98 * 0.02)


def test_rare_tokens_that_are_never_drawn_are_missed_where_the_actor_is_sure():
    """Beside many uncertain draws the 200 of them would not be noticed."""
    probs = torch.tensor([[0.99, 0.006, 0.004], [0.5, 0.3, 0.2]], dtype=torch.float64)
    rows, tokens = torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 2])
    draws = Draws(rows, tokens, torch.tensor([20_000, 50_000, 30_000, 20_000]).double(), torch.ones(4).double())
    sums = strata(Laws(probs, torch.ones(2, 3, dtype=torch.bool)), draws)
    assert sums.classes().p_value < 1e-12 and sums.surprisal().p_value < 1e-12 and sums.both().p_value < 1e-12
    assert sums.whole.classes().p_value > 1e-3
    assert sums.classes().statistic == pytest.approx(sums.sure.classes().statistic + sums.uncertain.classes().statistic)
    assert sums.classes().df == sums.sure.classes().df + sums.uncertain.classes().df
    again = Strata.of_state(sums.state_dict())
    assert again.both() == sums.both() and (again + sums).both() == sums.times(2.0).both()


def test_tokens_that_are_not_certain_do_not_count():
    probs = torch.tensor([[0.5, 0.3, 0.2, 0.0]], dtype=torch.float64)
    certain = torch.tensor([[True, True, False, False]])
    one = torch.ones(2, dtype=torch.float64)
    sums = sums_of(Laws(probs, certain), Draws(torch.tensor([0, 0]), torch.tensor([2, 3]), one, one))
    assert not sums.difference.any() and sums.ratio == pytest.approx(-1.6) and sums.reached == pytest.approx(1.6)
    huge = torch.tensor([9.0, math.inf], dtype=torch.float64)
    sums = sums_of(Laws(probs, certain), Draws(torch.tensor([0, 0]), torch.tensor([2, 3]), one, huge))
    assert not sums.largest.any() and not sums.excess.any() and sums.ratio == pytest.approx(-1.6)


def test_a_token_of_probability_zero_is_as_surprising_as_can_be():
    probs = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    sums = sums_of(
        Laws(probs, torch.ones(1, 3, dtype=torch.bool)), Draws(torch.tensor([0]), torch.tensor([2]), one, one)
    )
    assert sums.difference.tolist() == pytest.approx([-0.5, -0.5, 1, 16 - math.log(2)])
