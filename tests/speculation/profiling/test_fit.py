"""speculation/cost.py and fit.py: terms are recovered, held-out cells predicted, and poor profiles refused."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from respec_trainer.errors import ConfigError
from respec_trainer.speculation.cost import CostModel, Terms, Work, graph_batch
from respec_trainer.speculation.profiling.fit import better, describe_forms, fit_costs, fit_forms
from respec_trainer.speculation.profiling.held_out import held_out
from respec_trainer.speculation.profiling.profile import Profile, Timing
from respec_trainer.speculation.shape import OFF, Shape, chain
from tests.support.h100 import GRAPHS, H100
from tests.support.speculation import CPU, GPU, IDENTITY, profile_of

SMOOTH_MAX = Terms(fixed=1.0, each=0.5, weights=3.0, kv=0.1, token=2.0, pair=0.01, overlap=2.0)


def test_the_formula_by_hand():
    """Four sequences of 10 tokens; three drafts each, of which the first needs no pass."""
    work = Work.of("verify", chain(3), 4, 10)
    assert work == (4, 1, 16, 40, 160)
    assert SMOOTH_MAX.seconds(work) == pytest.approx(1 + 2 + math.hypot(3 + 4, 32 + 1.6))
    assert Work.of("draft", Shape(3, 2, 6), 4, 10) == (4, 2, 8, 40, 80)
    assert Work.of("plain", OFF, 4, 10) == (4, 1, 4, 40, 40)
    assert Work.of("catch_up", OFF, 4, 10) == (4, 1, 40, 0, 200)


def test_attention_as_a_kernel_of_its_own_by_hand():
    """Neither what it reads nor what it computes is hidden behind the other kernels."""
    work = Work.of("verify", chain(3), 4, 10)
    apart = dataclasses.replace(SMOOTH_MAX, apart=1.0)
    assert apart.seconds(work) == pytest.approx(1 + 2 + math.hypot(3, 32) + 4 + 1.6)
    turns = dataclasses.replace(SMOOTH_MAX, overlap=1.0)
    assert dataclasses.replace(turns, apart=1.0).seconds(work) == pytest.approx(turns.seconds(work))


def test_a_graph_computes_its_own_batch_size():
    """The rows that pad it have no context, and prompts have no graphs."""
    assert Work.of("verify", chain(3), 5, 10, (1, 4, 8)) == (5, 1, 8 * 4, 50, 200)
    assert Work.of("draft", Shape(3, 2, 6), 5, 10, (1, 4, 8)) == (5, 2, 8 * 2, 50, 100)
    assert Work.of("catch_up", OFF, 5, 10, (1, 4, 8)) == Work.of("catch_up", OFF, 5, 10)
    assert Work.of("rest", chain(3), 5, 10, (1, 4, 8)).tokens == 20


@given(st.lists(st.integers(1, 70), max_size=9, unique=True).map(sorted))
def test_the_smallest_graph_that_holds_a_batch(graphs):
    sizes = [next((size for size in graphs if size >= batch), batch) for batch in range(1, 80)]
    assert [graph_batch(batch, graphs) for batch in range(1, 80)] == sizes
    assert graph_batch(np.arange(1.0, 80.0), graphs).tolist() == sizes


@given(st.floats(1, 100), st.floats(1, 5000), st.integers(1, 8))
def test_costs_rise_with_batch_context_and_steps(batch, context, steps):
    for costs in (CPU, GPU):
        here = costs.cycle_seconds(chain(steps), batch, context)
        assert here < costs.cycle_seconds(chain(steps), batch + 1, context)
        assert here < costs.cycle_seconds(chain(steps), batch, context + 1)
        assert here < costs.cycle_seconds(chain(steps + 1), batch, context)


def test_arrays_and_numbers_agree():
    batch, context = np.array([1.0, 7.0]), np.array([100.0, 900.0])
    together = GPU.cycle_seconds(chain(3), batch, context)
    assert together.tolist() == pytest.approx(
        [GPU.cycle_seconds(chain(3), 1, 100), GPU.cycle_seconds(chain(3), 7, 900)]
    )


@pytest.mark.parametrize("truth", [CPU, GPU], ids=["cpu", "gpu"])
def test_exact_times_are_predicted_everywhere(truth):
    """Predictions also hold between cells and for steps that were not measured. The true costs follow the same formula:
    the errors are rounding, and terms that the cells cannot separate."""
    model = fit_costs(profile_of(truth))
    for batch, context, steps in ((3, 300, 4), (24, 1000, 2), (50, 200, 6), (64, 1500, 3)):
        for shape in (OFF, chain(steps)):
            expected = truth.cycle_seconds(shape, batch, context)
            assert model.cycle_seconds(shape, batch, context) == pytest.approx(expected, rel=0.01)
        assert model.catch_up_seconds(batch, context) == pytest.approx(truth.catch_up_seconds(batch, context), rel=0.01)
        warm = truth.piece_seconds("extend", OFF, batch, context)
        assert model.piece_seconds("extend", OFF, batch, context) == pytest.approx(warm, rel=0.01)
        assert model.prefill_seconds(batch, context) == pytest.approx(truth.prefill_seconds(batch, context), rel=0.01)


@pytest.mark.parametrize("truth", [CPU, GPU], ids=["cpu", "gpu"])
def test_noisy_times_are_predicted_within_their_noise(truth):
    """3 % of noise leaves the medians of five repeats off by 1.6 %, and predictions by less of the truth."""
    profile = profile_of(truth, noise=0.03)
    quality = held_out(profile)
    assert quality.mape < 0.016 and quality.sign_accuracy > 0.97 and quality.cells == len(profile.cells)
    assert "right about" in str(quality)
    assert quality.sign_accuracy <= quality.settled_accuracy and 0.9 < quality.settled < 1


BETWEEN = (1, 2, 4, 8, 16, 17, 32, 33, 64, 65, 128)
STEPS = (0, 1, 2, 3, 5)


def errors_of(model: CostModel) -> tuple[float, float, float]:
    """(mean, worst error of a cycle's time, mean loss of deciding by the model) at batches and contexts in between."""
    errors, losses = [], []
    for batch, context in itertools.product(range(1, 129, 3), (200, 500, 1000, 2000, 4000)):
        true = [H100().cycle_seconds(chain(steps), batch, context) for steps in STEPS]
        found = [model.cycle_seconds(chain(steps), batch, context) for steps in STEPS]
        errors += [abs(ours / theirs - 1) for ours, theirs in zip(found, true, strict=True)]
        for share in (0.2, 0.35, 0.5, 0.65, 0.8, 0.9):
            gains = [sum(share**depth for depth in range(steps + 1)) for steps in STEPS]
            paces = [taken / gain for taken, gain in zip(true, gains, strict=True)]
            chosen = min(range(5), key=lambda i, gains=gains: found[i] / gains[i])
            losses.append(paces[chosen] / min(paces) - 1)
    return float(np.mean(errors)), max(errors), float(np.mean(losses))


def test_a_gpu_with_stairs_is_predicted_between_its_graphs():
    """Attention of its own and the graphs' sizes each take away a part of the error."""
    profile = profile_of(H100(), 0.02, BETWEEN, (150, 600, 2500, 6000), graphs=GRAPHS)
    within, apart = fit_forms(profile.cells, GRAPHS)
    blind = fit_forms(profile.cells)[1].costs
    assert better(within, apart) is apart and fit_costs(profile) == apart.costs
    assert "apart from the roofline" in describe_forms(within, apart)
    (mean, worst, loss), narrow, unpadded = map(errors_of, (apart.costs, within.costs, blind))
    assert mean < 0.01 and worst < 0.06 and loss < 0.0025
    assert narrow[0] > 2 * mean and narrow[1] > 2 * worst and narrow[2] > 3 * loss
    assert unpadded[0] > 1.3 * mean and unpadded[1] > 1.3 * worst
    assert held_out(profile).mape < 0.01


@pytest.mark.parametrize("truth", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_a_machine_that_hides_attention_keeps_the_first_form(truth, noise):
    within, apart = fit_forms(profile_of(truth, noise).cells)
    assert better(within, apart) is within and "within the roofline" in describe_forms(within, apart)


def test_one_corrupted_point_is_far_off_when_it_is_held_out():
    """Its times are a fifth of the true ones: a fit that had seen them would come closer, here with two batches only
    beside it."""
    profile, place = profile_of(CPU), (64, 2048)
    cells = []
    for cell in profile.cells:
        faster = {part: Timing(seconds=[each / 5 for each in time.seconds]) for part, time in cell.times.items()}
        here = (cell.batch, cell.context) == place
        cells.append(cell.model_copy(update={"times": faster}) if here else cell)
    quality = held_out(Profile(identity=IDENTITY, cells=cells))
    assert quality.worst == pytest.approx(4.0, rel=0.03), "(t - t / 5) / (t / 5)"


def test_cases_on_which_repeats_disagree_are_not_settled():
    """If the noise exceeds all gains, few cases are settled."""
    exact, blurred = held_out(profile_of(CPU)), held_out(profile_of(CPU, noise=0.3))
    assert exact.settled == 1 and exact.settled_accuracy == exact.sign_accuracy
    assert blurred.settled < 0.7 and blurred.settled_accuracy > blurred.sign_accuracy + 0.02


def test_trees_are_predicted_too():
    """Each branch of a tree attends to the whole context, which separates its costs from a chain's."""
    trees = [Shape(2, 2, 4), Shape(3, 4, 8), Shape(5, 4, 16)]
    profile = profile_of(CPU, noise=0.03, shapes=[chain(1), chain(3), *trees])
    quality, model = held_out(profile), fit_costs(profile)
    assert quality.mape < 0.016 and quality.sign_accuracy > 0.97  # as for chains
    expected = CPU.cycle_seconds(Shape(4, 2, 8), 24, 700)
    assert model.cycle_seconds(Shape(4, 2, 8), 24, 700) == pytest.approx(expected, rel=0.02)


def test_an_outlier_does_not_bend_the_fit():
    profile = profile_of(CPU)
    cells = list(profile.cells)
    where = next(i for i, cell in enumerate(cells) if cell.shape == OFF and cell.batch == 16)
    slow = Timing(seconds=[5 * cells[where].seconds])
    cells[where] = cells[where].model_copy(update={"times": cells[where].times | {"plain": slow}})
    model = fit_costs(Profile(identity=IDENTITY, cells=cells))
    for batch, context in ((16, 512), (64, 128)):  # squares of errors alone would be 5 % off at the second
        assert model.step_seconds(batch, context) == pytest.approx(CPU.step_seconds(batch, context), rel=0.01)


def test_what_lies_between_the_parts_counts():
    """A cycle that takes 10 ms and 1 ms a sequence more than its parts."""
    cells = []
    for cell in profile_of(CPU).cells:
        times = dict(cell.times)
        if cell.shape != OFF:
            times["cycle"] = Timing(seconds=[cell.seconds + 0.010 + 0.001 * cell.batch])
        cells.append(cell.model_copy(update={"times": times}))
    model = fit_costs(Profile(identity=IDENTITY, cells=cells))
    expected = CPU.cycle_seconds(chain(4), 24, 700) + 0.034
    assert model.cycle_seconds(chain(4), 24, 700) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        (profile_of(CPU, batches=(1, 8)), r"plain cells \(steps=0\): batch: 3 different values needed, has \[1, 8\]"),
        (profile_of(CPU, contexts=(128,)), r"steps >= 1: context: 2 different values needed, has \[128\]"),
        (profile_of(CPU, shapes=[chain(3)]), r"steps >= 1: steps: 2 different values needed, has \[3\]"),
        (profile_of(CPU, shapes=[]), r"cells with steps >= 1: batch: 3 different values needed, has \[\]"),
    ],
)
def test_too_few_cells_name_what_is_missing(profile, words):
    for attempt in (fit_costs, held_out):
        with pytest.raises(ConfigError, match=words):
            attempt(profile)


def test_speculative_cells_need_plain_ones():
    cells = [cell for cell in profile_of(CPU).cells if (cell.batch, cell.context, cell.shape) != (8, 512, OFF)]
    with pytest.raises(ConfigError, match="plain cell at batch=8, context=512"):
        fit_costs(Profile(identity=IDENTITY, cells=cells))


def test_parts_that_are_optional_need_cells_too():
    cells = []
    for cell in profile_of(CPU).cells:
        times = {part: time for part, time in cell.times.items() if part != "catch_up" or cell.batch == 8}
        cells.append(cell.model_copy(update={"times": times}))
    with pytest.raises(ConfigError, match=r"cells with catch_up: batch: 3 different values needed, has \[8\]"):
        fit_costs(Profile(identity=IDENTITY, cells=cells))
    bare = [c.model_copy(update={"times": {k: v for k, v in c.times.items() if k != "catch_up"}}) for c in cells]
    assert not fit_costs(Profile(identity=IDENTITY, cells=bare)).has("catch_up")


def test_times_that_were_not_measured_are_not_made_up():
    with pytest.raises(ConfigError, match="no times of catch_up"):
        CostModel({"plain": Terms(fixed=1.0)}).catch_up_seconds(1, 1)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.floats(1e-6, 1e-2), min_size=6, max_size=6), st.sampled_from([1.0, 4.0]))
def test_terms_are_never_negative(values, overlap):
    terms = Terms(*values, overlap)
    truth = CostModel(dict.fromkeys(("plain", "draft", "verify", "extend", "catch_up", "prefill"), terms))
    model = fit_costs(profile_of(truth, noise=0.2, contexts=(64, 256)))
    assert all(min(vars(terms).values()) >= 0 for terms in model.pieces.values())
