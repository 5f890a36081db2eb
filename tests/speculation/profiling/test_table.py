"""speculation/profiling/table.py, solver.py and view.py: the paper's Fig 7, and tables predicted and measured."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from respec_trainer.errors import ConfigError
from respec_trainer.speculation.profiling.profile import load_json
from respec_trainer.speculation.profiling.solver import Solver, measured_table
from respec_trainer.speculation.profiling.table import SpeedupTable, steps_by_batch, write_engine_table
from respec_trainer.speculation.profiling.view import heat_map, render
from respec_trainer.speculation.shape import OFF, Shape, chain
from tests.support.speculation import BATCHES, CHAINS, CPU, GPU, profile_of

FIG7 = Path(__file__).with_name("speedups_fig7.json")
ACCEPTANCE = [0.7, 0.6, 0.5]


def test_the_paper_s_table():
    """The paper's numbers of Fig 7, and the gain of its choice over one shape for all batch sizes."""
    table = load_json(FIG7, SpeedupTable, "table of speed-ups")
    best = [(5, 8, 32), (5, 8, 32), (3, 8, 16), (3, 8, 8), (3, 8, 8), (3, 5, 8), OFF]
    assert table.policy() == dict(zip((1, 2, 4, 8, 16, 32, 64), best, strict=True))
    assert round(table.gain(), 3) == 1.270
    assert table.static() == (Shape(3, 8, 16), pytest.approx(1.163, abs=5e-4))
    assert table.static(switched=True) == (Shape(3, 8, 16), pytest.approx(1.200, abs=5e-4))


@given(st.lists(st.lists(st.floats(0.3, 3), min_size=3, max_size=3), min_size=1, max_size=7))
def test_choosing_is_never_worse(rows):
    table = SpeedupTable(source="random", batches=list(range(1, len(rows) + 1)), shapes=list(CHAINS[:3]), speedups=rows)
    assert table.gain() >= table.static(switched=True)[1] - 1e-12 >= table.static()[1] - 2e-12
    assert table.gain() == pytest.approx(np.exp(np.log(np.maximum(np.array(rows).max(1), 1)).mean()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batches": [2, 1]}, r"batches: \[2, 1\] must rise"),
        ({"batches": [1]}, "2 rows for 1 batches"),
        ({"speedups": [[1.0], [1.0, 2.0]]}, "speedups.0: 1 numbers for 2 shapes"),
        ({"speedups": [[1.0, 0.0], [1.0, 2.0]]}, "speedups.0.1: .* greater than 0"),
        ({"shapes": [[1, 1, 2], [1, 1, 2]]}, "shapes: each once"),
        ({"shapes": [[1, 1, 2], [1, 1, 5]]}, "shapes: .* drafts only 1"),
        ({"shapes": [[1, 1, 2], [0, 1, 1]]}, "no plain decoding"),
    ],
)
def test_malformed_tables_name_the_field(tmp_path, change, words):
    tree = {"source": "x", "batches": [1, 2], "shapes": [[1, 1, 2], [2, 1, 3]], "speedups": [[1.0, 1.2], [0.9, 1.0]]}
    (tmp_path / "t.json").write_text(json.dumps(tree | change))
    with pytest.raises(ConfigError, match=words):
        load_json(tmp_path / "t.json", SpeedupTable, "table of speed-ups")


def test_the_engine_reads_its_table(tmp_path):
    """SGLang's own reader chooses the written steps at every batch size."""
    from respec_trainer.compat.torchvision_cpu import define_torchvision_operators

    define_torchvision_operators()
    from sglang.srt.speculative.adaptive_spec_params import AdaptiveSpeculativeParams

    policy = {1: chain(3), 4: chain(3), 16: chain(2), 32: OFF, 64: OFF}
    assert steps_by_batch(policy) == {1: 3, 16: 2, 32: 0}
    write_engine_table(policy, tmp_path / "table.json")
    reader = AdaptiveSpeculativeParams(initial_steps=3, cfg_path=str(tmp_path / "table.json"))
    assert reader.candidate_steps == [0, 2, 3]
    chosen = {batch: reader.get_steps_for_batch(batch) for batch in (1, 3, 15, 16, 31, 32, 64, 500)}
    assert chosen == {1: 3, 3: 3, 15: 3, 16: 2, 31: 2, 32: 0, 64: 0, 500: 0}


def test_a_tree_cannot_be_switched(tmp_path):
    with pytest.raises(ConfigError, match=r"batch 1: .* the best shape is \(5,8,32\); choose among chains"):
        write_engine_table(load_json(FIG7, SpeedupTable, "table of speed-ups").policy(), tmp_path / "table.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("truth", [CPU, GPU], ids=["cpu", "gpu"])
def test_the_solver_chooses_by_throughput(truth):
    solver = Solver(truth, CHAINS)
    table = solver.table(BATCHES, 512, ACCEPTANCE)
    for batch, chosen in table.policy().items():
        assert chosen == solver.best(batch, 512, ACCEPTANCE)
        rates = {shape: solver.tokens_per_second(shape, batch, 512, ACCEPTANCE) for shape in (OFF, *CHAINS)}
        assert chosen == max(rates, key=rates.get)
        assert solver.speedup(chosen, batch, 512, ACCEPTANCE) == pytest.approx(rates[chosen] / rates[OFF])
    assert solver.best(8, 512, [0.0]) == OFF


def test_what_is_predicted_was_measured():
    """Medians of five repeats with 3 % noise have errors of 1.6 %, and their ratios 2.3 %: allow three times that."""
    profile = profile_of(CPU, noise=0.03)
    predicted, measured = Solver.of(profile).table(BATCHES, 512, ACCEPTANCE), measured_table(profile, 512, ACCEPTANCE)
    assert (predicted.batches, predicted.shapes) == (measured.batches, measured.shapes)
    np.testing.assert_allclose(predicted.speedups, measured.speedups, rtol=0.07)
    with pytest.raises(ConfigError, match=r"at context=100; it has contexts \[128, 512, 2048\]"):
        measured_table(profile, 100, ACCEPTANCE)


def test_a_table_for_people(tmp_path):
    table = load_json(FIG7, SpeedupTable, "table of speed-ups")
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render(table))
    text = console.export_text()
    assert "5,8,32" in text and "1.464" in text and "best in each row 1.270; always 3,8,16 1.163" in text
    heat_map(table, tmp_path / "map.png")
    from matplotlib.image import imread

    image = imread(tmp_path / "map.png")
    assert image.shape[0] > 300 and image.shape[1] > 300 and image.std() > 0.1
