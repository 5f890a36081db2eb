"""audit/cells.py: every algorithm is audited, and cells that change the actor come last."""

from __future__ import annotations

import pytest

from respec_trainer.audit.cells import all_cells, all_modes, speculation_of
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
