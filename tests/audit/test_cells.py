"""audit/cells.py: every algorithm is audited, and cells that change the actor come last."""

from __future__ import annotations

import pytest

from respec_trainer.audit.cells import CONTROL, Cell, all_cells, all_modes, speculation_of
from respec_trainer.config import SpeculationConfig
from respec_trainer.speculation.algorithms import ALGORITHMS
from respec_trainer.speculation.algorithms.checks import check_speculation


def test_every_algorithm_has_a_cell():
    modes = all_modes()
    assert {modes[cell.mode].speculation["algorithm"] for cell in all_cells()} == set(ALGORITHMS)


def test_cells_of_one_mode_are_together_and_those_that_change_the_actor_last():
    cells = all_cells()
    order = list(dict.fromkeys(cell.mode for cell in cells))
    assert [cell.mode for cell in cells] == sorted((cell.mode for cell in cells), key=order.index)
    changing = [cell.before != "nothing" for cell in cells]
    assert changing == sorted(changing) and any(changing)


@pytest.mark.parametrize(
    "base",
    [
        SpeculationConfig(),
        SpeculationConfig(steps=5, draft_tokens=6, policy="adaptive", profile="p.json", candidates=[0, 5]),
    ],
)
def test_modes_of_any_configuration_can_run(base):
    for mode in all_modes().values():
        check_speculation(speculation_of(mode, base))


def test_a_mode_overrides_the_configuration_but_for_what_may_be_lossy():
    lossy = {"accept_threshold_single": 0.8, "accept_threshold_acc": 0.9, "allow_lossy": True}
    base = SpeculationConfig(steps=5, draft_tokens=6, rejection_sampling=False, **lossy)
    modes = all_modes()
    chain = speculation_of(modes["EAGLE-3 chain"], base)
    assert (chain.steps, chain.topk, chain.draft_tokens, chain.algorithm) == (3, 1, 4, "eagle3")
    assert (chain.accept_threshold_single, chain.accept_threshold_acc, chain.allow_lossy) == (0.8, 0.9, True)
    assert speculation_of(modes["EAGLE-3 rejection"], SpeculationConfig()).rejection_sampling
    sampled = SpeculationConfig(rejection_sampling=True)
    assert not speculation_of(modes["EAGLE-3 chain"], sampled).rejection_sampling
    assert speculation_of(CONTROL, SpeculationConfig()).accept_threshold_acc == 0.7


def test_a_cell_is_named_by_its_mode_sampling_and_event():
    assert Cell("no speculation", {"top_p": 0.9}).name == "no speculation, T=1.0, top_p=0.9"
    assert (
        Cell("m", {"temperature": 0.3}, "sleep", ends=True).name == "m, T=0.3, stops and limits, after sleep and wake"
    )
    assert Cell("m", before="resync").name == "m, T=1.0, after a resync"
