"""audit/sums.py: size and power of its tests, on draws of pairs of actor and sampler."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import chi2, kstest, ncx2, norm

from benchmarks.audit_pairs import Pair, accept, shift
from respec_trainer.audit.scores import Strata
from respec_trainer.audit.sums import ScoreSums
from respec_trainer.rollout.sample import SamplingParams

BF16 = Pair(0.062)  # a divergence of 1e-3
TO_THE_TOP = shift(0.02, slice(1, None), slice(0, 1))


def audits(pair: Pair, count: int, tokens: int, seed: int = 0, fault=None) -> list[Strata]:
    generator = torch.Generator().manual_seed(seed)
    return [pair.draw(tokens, generator, fault).sums() for _ in range(count)]


def total(parts: list[Strata]) -> Strata:
    return sum(parts[1:], parts[0])


def sums_of(difference, expected, **more) -> ScoreSums:
    size = len(difference)
    zero = {"excess": np.zeros((size, size)), "largest": np.zeros(size), "fourth": 1.0, "ratio": 0.0}
    fields = zero | {"ratio_square": 0.0, "draws": 1000.0, "reached": 1000.0} | more
    return ScoreSums(difference=np.array(difference), expected=np.array(expected), **fields)


@pytest.fixture(scope="module")
def in_bf16() -> list[Strata]:
    return audits(BF16, 100, 3000)


def test_p_values_of_a_sampler_in_bf16_are_uniform(in_bf16):
    for test in ("both", "classes", "surprisal"):
        p_values = [getattr(sums, test)().p_value for sums in in_bf16]
        assert kstest(p_values, "uniform").pvalue > 1e-3, test
    assert min(sums.whole.ratio_p_value() for sums in in_bf16) > 1e-3


def test_all_tokens_together_do_not_refute_it(in_bf16):
    """Each token counts by its ratio. Where actor and sampler disagree, counting each as 1 finds that."""
    assert total(in_bf16).both().p_value > 1e-3
    stale = Pair(0.062, stale=0.4)
    assert total(audits(stale, 20, 5000)).both().p_value > 1e-3
    generator = torch.Generator().manual_seed(0)
    assert total([stale.draw(5000, generator).sums(weighted=False) for _ in range(20)]).both().p_value < 1e-9


@pytest.mark.parametrize("params", [SamplingParams(1, top_p=0.9), SamplingParams(1, top_k=8)])
def test_a_sampler_that_cuts_other_tokens_at_the_edge_is_right(params):
    parts = audits(replace(BF16, params=params), 50, 2500)
    assert kstest([sums.both().p_value for sums in parts], "uniform").pvalue > 1e-3
    assert total(parts).both().p_value > 1e-3 and total(parts).whole.ratio_p_value() > 1e-3


@pytest.mark.parametrize("stale", [0.1, 0.4])
def test_ratios_up_to_50_and_more_refute_no_stale_samples(stale):
    parts = audits(Pair(0.062, stale=stale), 50, 2500)
    assert min(sums.both().p_value for sums in parts) > 1e-4 and total(parts).both().p_value > 1e-4
    assert sum(sums.both().p_value < 0.05 for sums in parts) < 10


def test_draws_that_chance_left_out_refute_nothing():
    """Two thirds of the mass of the rare class are of tokens that the sampler makes 20 times rarer than the actor."""
    generator, least = np.random.default_rng(0), 1.0
    for _ in range(300):
        often, seldom, other = generator.poisson([900, 10, 30_000])
        size = often + seldom + other
        rare = np.array([-0.01, 0.99])
        difference = seldom * 20 * rare[1] + often / 9 * rare[1] + other * 30_700 / 30_000 * rare[0]
        ratio = np.repeat([20, 1 / 9, 1.0], [seldom, often, other])
        assert len(ratio) == size
        largest = float(((ratio**2 - ratio) ** 4).sum())
        spread = 300 * rare[1] ** 2
        excess = seldom * 380 + often * (1 / 81 - 1 / 9)
        sums = sums_of(
            [-difference, difference, 0],
            [[spread, -spread, 0], [-spread, spread, 0], [0, 0, 0]],
            excess=np.array([[excess, -excess, 0], [-excess, excess, 0], [0, 0, 0]]),
            largest=np.array([largest, largest, 0]),
            fourth=0.0,
        )
        least = min(least, sums.both().p_value)
    assert least > 1e-4


@pytest.mark.parametrize("fault", [accept(0.9), TO_THE_TOP], ids=["p / 0.9", "0.02 moved"])
def test_faults_are_found(fault):
    assert total(audits(BF16, 5, 10_000, fault=fault)).both().p_value < 1e-6


def test_log_probs_of_the_whole_vocabulary_are_found():
    """An engine that samples with top_p, but reports log-probs as if it did not."""
    drawn = replace(BF16, params=SamplingParams(1, top_p=0.9)).draw(5000, torch.Generator().manual_seed(0))
    assert drawn.sums().whole.ratio_p_value() > 1e-6
    kept = replace(drawn, sampler_logprobs=drawn.sampler_logprobs + math.log(0.95))
    assert kept.sums().whole.ratio_p_value() < 1e-6 and kept.sums().whole.mean_ratio == pytest.approx(
        1 / 0.95, rel=0.01
    )


def test_a_mean_ratio_within_float32_is_right():
    assert sums_of([0, 0, 0], np.eye(3), ratio=0.9, ratio_square=1e-9).ratio_p_value() == 1
    off = sums_of([0, 0, 0], np.eye(3), ratio=-3.0, ratio_square=1.0)
    assert off.ratio_p_value() == pytest.approx(2 * norm.sf(2.0)) and off.mean_ratio == 0.997
    missing = replace(off, largest=np.array([16.0, 0, 0]))
    assert missing.ratio_p_value() == pytest.approx(2 * norm.sf(2 / math.sqrt(17)))


def test_a_ratio_that_is_not_a_number_is_proof():
    broken = sums_of([math.nan, 0, 0], 1e4 * np.eye(3), ratio=math.nan, ratio_square=math.inf)
    assert broken.both().p_value == broken.ratio_p_value() == 0


def test_the_statistic_is_that_of_the_normal_distribution():
    covariance = np.array([[400, -300, -100, 10], [-300, 420, -120, 5], [-100, -120, 220, -8], [10, 5, -8, 300.0]])
    difference = np.array([30, -10, -20, 25.0])
    sums = sums_of(difference, covariance)
    rows = [1, 2, 3]
    expected = difference[rows] @ np.linalg.inv(covariance[np.ix_(rows, rows)]) @ difference[rows]
    assert sums.both().statistic == pytest.approx(expected) and sums.both().df == 3
    assert sums.classes().df == 2 and sums.surprisal().p_value == pytest.approx(2 * norm.sf(25 / math.sqrt(300)))
    flipped = replace(sums, difference=-difference)
    assert flipped.surprisal().p_value == sums.surprisal().p_value and flipped.both().p_value == sums.both().p_value


def test_what_the_ratios_add_is_part_of_the_variance():
    added = sums_of(
        [0, 20, -20, 30.0], np.diag([400.0] * 4), excess=np.diag([0, 0, 0, 200.0]), largest=np.array([0, 0, 0, 16.0])
    )
    assert added.surprisal().statistic == pytest.approx(30**2 / (400 + 200 + 8 * 2))


@pytest.mark.parametrize(
    ("variances", "groups"),
    [
        ([900, 500, 101, 102, 103], ["10000", "01000", "00100", "00010", "00001"]),
        ([900, 500, 40, 35, 15], ["10000", "01100", "00011"]),
        ([30, 500, 40, 35, 10], ["11000", "00111"]),  # what is left over joins the group before it
        ([15, 10, 10, 5, 5], []),
    ],
)
def test_classes_with_little_variance_are_tested_as_one(variances, groups):
    found = sums_of([0.0] * 6, np.diag([*variances, 400.0])).groups()
    assert ["".join(str(int(one)) for one in group[:-1]) for group in found] == groups
    assert found.shape == (len(groups), 6) and not found[:, -1].any()


def test_the_surprisal_of_few_rare_draws_is_not_tested():
    few = sums_of([0, 0, 50.0], np.diag([900.0, 900, 400]), fourth=3201.0)
    assert few.surprisal().df == 0 and few.surprisal().p_value == 1
    assert replace(few, fourth=3199.0).surprisal().df == 1


def test_nothing_drawn_proves_nothing():
    nothing = sums_of([0.0] * 4, np.zeros((4, 4)), draws=0.0, reached=0.0, fourth=0.0)
    assert (nothing.both().p_value, nothing.ratio_p_value(), nothing.power(0.02, 0.01, 0)) == (1.0, 1.0, 0.0)
    assert nothing.total_variation == 0 and nothing.mean_ratio == 1


def test_power_is_that_of_the_direction_which_is_hardest_to_see():
    """No shift of the classes by the same total is seen less often than the bound says."""
    covariance = np.array([[500, -350, -150, 0], [-350, 600, -250, 0], [-150, -250, 400, 0], [0, 0, 0, 1.0]])
    sums, level = sums_of([0.0] * 4, covariance, reached=2000.0), 1e-3
    least = 1.0
    for one, two in product(np.linspace(-1, 1, 41), repeat=2):
        shift = np.array([one, two, -one - two])
        if not np.abs(shift).sum():
            continue
        shift *= 2 * 0.02 * 2000 / np.abs(shift).sum()
        noncentrality = shift[1:] @ np.linalg.inv(covariance[1:3, 1:3]) @ shift[1:]
        least = min(least, ncx2.sf(chi2.isf(level, 2), 2, noncentrality))
    assert sums.power(0.02, level, 2) <= least * (1 + 1e-9) and sums.power(0.02, level, 2) > 0.5 * least
    assert replace(sums, reached=4000.0).power(0.02, level, 2) > sums.power(0.02, level, 2)
    assert replace(sums, draws=1e9).power(0.02, level, 2) == sums.power(0.02, level, 2), "only uncertain draws count"


def test_the_power_promised_is_kept():
    parts = audits(BF16, 40, 5000, seed=2, fault=TO_THE_TOP)
    promised = np.mean([sums.uncertain.power(0.02, 1e-3, sums.classes().df) for sums in audits(BF16, 5, 5000, seed=3)])
    found = np.mean([sums.classes().p_value < 1e-3 for sums in parts])
    assert promised > 0.05 and found >= promised - 3 * math.sqrt(promised * (1 - promised) / 40)


def test_total_variation_is_what_moved_where_the_actor_is_uncertain():
    moved = total(audits(BF16, 20, 5000, fault=TO_THE_TOP))
    assert moved.uncertain.total_variation == pytest.approx(0.02, abs=0.004)
    assert total(audits(BF16, 20, 5000)).uncertain.total_variation < 0.004


def test_sums_are_added_and_kept_as_json():
    one, two = (part.uncertain for part in audits(BF16, 2, 1000))
    both = one + two
    assert np.allclose(both.difference, one.difference + two.difference) and both.draws == one.draws + two.draws > 0
    assert np.allclose(both.largest, one.largest + two.largest)
    again = ScoreSums.of_state(both.state_dict())
    assert again.both() == both.both() and (again + one).both() == (both + one).both()
    assert np.allclose(both.times(2.0).expected, 2 * both.expected) and both.times(2.0).reached == 2 * both.reached
