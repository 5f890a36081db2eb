"""profiling/readings.py, measure.py and trees.py: readings from a log, and measurements that can be continued."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from respec_trainer.config import SamplingConfig
from respec_trainer.errors import EngineError
from respec_trainer.rollout.decode_log import DecodeLog
from respec_trainer.rollout.sample import Sample
from respec_trainer.speculation.profiling.fit import fit_costs
from respec_trainer.speculation.profiling.held_out import held_out
from respec_trainer.speculation.profiling.measure import Plan, Visits, measure, visit
from respec_trainer.speculation.profiling.profile import load_profile
from respec_trainer.speculation.profiling.readings import cells_of, read_log
from respec_trainer.speculation.profiling.trees import TOKENS, tree_cells
from respec_trainer.speculation.shape import OFF, Shape, chain
from tests.support.speculation import CPU, IDENTITY

SAMPLING = SamplingConfig(max_new_tokens=8)
GRAPHS = (1, 3, 4, 8, 16, 64)  # of an engine that has padded nothing at the places below


def log_of(rows: list[dict]) -> DecodeLog:
    """Make a log of rows that follow each other, each with its seconds in `taken`."""
    log, columns = DecodeLog(), ("prefill", "batch", "context", "steps", "tokens", "draft", "verify", "extend")
    for name in (*columns, "catch_up", "caught_up", "switch"):
        setattr(log, name, np.array([row.get(name, 0) for row in rows], getattr(log, name).dtype))
    log.start = np.cumsum([100.0, *(row["taken"] for row in rows[:-1])])
    return log


def test_a_log_by_hand():
    decode = {"batch": 2, "context": 50.0}
    log = log_of(
        [
            {"prefill": True, "batch": 1, "tokens": 40, "taken": 4.0, "extend": 0.3},
            {"prefill": True, "batch": 1, "tokens": 40, "taken": 3.0, "extend": 0.2},
            decode | {"taken": 1.0},
            decode | {"steps": 3, "taken": 3.0, "draft": 0.5, "verify": 1.5, "extend": 0.25}
            | {"catch_up": 0.4, "caught_up": 2, "switch": 0.1},
            decode | {"taken": 1.5, "extend": 0.2, "switch": 0.3},
            decode | {"taken": 1.1, "context": 53.0},
            {"batch": 1, "context": 60.0, "taken": 0.7},  # one has ended
            {"batch": 1, "context": 61.0, "taken": 0.7},
        ]
    )  # fmt: skip
    reading = read_log(log, 2)
    assert reading == pytest.approx(
        {"0.plain": 1.0, "0.extend": 0.2, "0.resume": 0.4, "0.switch": 0.15, "context": 50.75}
        | {"3.cycle": 2.5, "3.draft": 0.5, "3.verify": 1.5, "3.extend": 0.25}
        | {"0.prefill": 7.0, "0.catch_up": 0.5}
    )


def test_a_batch_before_prompts_or_before_the_end_has_no_length():
    """New prompts are read between the two decode batches, and no batch follows the last one."""
    decode = {"batch": 1, "context": 9.0, "taken": 1.0}
    reading = read_log(log_of([decode, {"prefill": True, "batch": 1, "taken": 5.0}, decode]), 1)
    assert "0.plain" not in reading


def test_a_resume_reads_one_token_of_each_sequence():
    """A pass over more of the backlog takes longer, and is none."""
    decode = {"batch": 2, "context": 9.0, "taken": 9.0}
    rows = [decode | {"caught_up": count, "catch_up": 0.1 * count} for count in (8, 2, 4, 1)]
    assert read_log(log_of([*rows, decode]), 2)["0.resume"] == pytest.approx(0.2)
    assert "0.resume" not in read_log(log_of([rows[0], decode]), 2)


class MadeUp:
    """An engine with the exact times of a cost model; its draft steps are random."""

    def __init__(self, costs=CPU, candidates=(0, 1, 3), most: int = 64, seed: int = 0):
        self.costs, self.candidates, self.most = costs, candidates, most
        self.generator = np.random.default_rng(seed)
        self.rows, self.visits = [], 0

    def submit(self, requests):
        batch, prompt = min(len(requests), self.most), len(requests[0].prompt_ids)
        tokens = requests[0].sampling.max_new_tokens
        self.visits += 1
        self.rows.append(
            {"prefill": True, "batch": batch, "tokens": batch * prompt}
            | {"taken": self.costs.prefill_seconds(batch, prompt), "extend": self.costs.catch_up_seconds(batch, prompt)}
        )
        missed = 0
        for done in range(tokens):
            steps = int(self.generator.choice(self.candidates))
            self.rows.append(self.decode(batch, prompt + done, steps, missed))
            missed = 0 if steps or self.rows[-1]["extend"] else missed + 1
        return self

    def decode(self, batch: int, context: int, steps: int, missed: int) -> dict:
        costs, row = self.costs, {"batch": batch, "context": float(context), "steps": steps, "extend": 0.0}
        for part in ("draft", "verify", "extend") if steps else ():
            row[part] = costs.piece_seconds(part, chain(steps), batch, context)
        if not steps and self.generator.random() < 0.5:
            row["extend"] = costs.piece_seconds("extend", OFF, batch, context)
        if missed and (steps or row["extend"]):
            row |= {"catch_up": costs.catch_up_seconds(batch, context, missed), "caught_up": missed * batch}
        whole = costs.cycle_seconds(chain(steps), batch, context) + (0 if steps else row["extend"])
        return row | {"switch": 1e-4, "taken": whole + row.get("catch_up", 0.0) + 1e-4}

    def collect(self):
        return []

    def take_decode_log(self):
        rows, self.rows = self.rows, []
        return replace(log_of(rows) if rows else DecodeLog(), graph_sizes=GRAPHS)


PLAN = Plan((1, 4, 16, 64), (32, 300), (0, 1, 3), repeats=2, most_tokens=10_000, seconds=60.0)


def test_a_profile_is_found_again(tmp_path):
    """Predictions also hold between cells. Contexts grow while a place is measured, so cells have their mean."""
    calls = []
    profile = measure(
        MadeUp(), PLAN, IDENTITY, SAMPLING, 512, tmp_path / "p.json", lambda done, total: calls.append((done, total))
    )
    assert (64, 300) not in PLAN.places and calls[-1] == (14, 14)
    assert profile.graph_sizes == list(GRAPHS)
    assert load_profile(tmp_path / "p.json") == profile and [path.name for path in tmp_path.iterdir()] == ["p.json"]
    model, quality = fit_costs(profile), held_out(profile)
    assert quality.mape < 0.02 and quality.sign_accuracy > 0.97
    for batch, context, steps in ((8, 150, 2), (16, 250, 0), (3, 60, 3)):
        expected = CPU.cycle_seconds(chain(steps), batch, context)
        assert model.cycle_seconds(chain(steps), batch, context) == pytest.approx(expected, rel=0.02)
    for missed in (1, 40, 150):
        expected = CPU.catch_up_seconds(8, 150, missed)
        assert model.catch_up_seconds(8, 150, missed) == pytest.approx(expected, rel=0.05)
    assert model.switch_seconds() == pytest.approx(1e-4)
    # 35 of the 36 batches are followed by another, so the middle one is the 18th.
    assert {cell.context for cell in profile.cells if cell.shape == chain(3)} == {49, 317}


def test_what_was_measured_is_not_measured_again(tmp_path):
    out = tmp_path / "p.json"
    visits = Visits(out, IDENTITY, PLAN)
    engine = MadeUp()
    for place in PLAN.places[:3]:
        visits.add(place, visit(engine, place, PLAN.tokens, SAMPLING, 512, np.random.default_rng(0)))
    with visits.path.open("a") as file:
        file.write('{"batch": 64, "context": 32, "read')  # interrupted while writing
    engine = MadeUp()
    measure(engine, PLAN, IDENTITY, SAMPLING, 512, out, lambda *_: None)
    assert engine.visits == 1 + 14 - 3  # one warms up
    assert Visits(out, IDENTITY, PLAN).path == visits.path and not visits.path.exists()
    assert Visits(out, IDENTITY.model_copy(update={"threads": 2}), PLAN).path != visits.path


def test_an_unfinished_profile_is_no_profile(tmp_path):
    def stop(done, _total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(MadeUp(), PLAN, IDENTITY, SAMPLING, 512, tmp_path / "p.json", stop)
    (partial,) = tmp_path.iterdir()
    assert partial.name.endswith(".partial") and len(partial.read_text().splitlines()) == 5


def test_too_little_time_for_another_repeat(tmp_path):
    engine = MadeUp()
    plan = Plan((1, 4, 16), (32, 300), (0, 1, 3), repeats=5, most_tokens=10_000, seconds=0.0)
    measure(engine, plan, IDENTITY, SAMPLING, 512, tmp_path / "p.json", lambda *_: None)
    assert engine.visits == 1 + 6  # once everywhere


def test_an_engine_that_is_too_small(tmp_path):
    with pytest.raises(EngineError, match="64 sequences of 32 tokens never ran together, in 37 batches of at most 63"):
        visit(MadeUp(most=63), (64, 32), 36, SAMPLING, 512, np.random.default_rng(0))


@pytest.mark.parametrize(("most", "between"), [(256, {33, 65, 129}), (64, {9, 17, 33}), (4, {2, 3}), (48, {7, 13, 25})])
def test_a_gpu_is_measured_between_its_graphs_too(most, between):
    plan, cpu = (Plan.of(most, 4096, (0, 1, 3), device) for device in ("cuda", "cpu"))
    assert set(plan.batches) == set(cpu.batches) | between and list(plan.batches) == sorted(plan.batches)
    quick = Plan.of(most, 4096, (0, 1, 3), "cuda", quick=True)
    assert set(quick.batches) == set(Plan.of(most, 4096, (0, 1, 3), "cpu", quick=True).batches) | {max(between)}


def test_plans():
    plan = Plan.of(64, 1024, (0, 1, 2, 3, 5), "cpu")
    assert plan.batches == (1, 2, 4, 8, 16, 32, 64) and plan.contexts == (56, 226, 904)
    assert plan.places[-1] == (64, 56) and (8, 904) in plan.places and (16, 904) not in plan.places
    assert Plan.of(48, 1024, (0, 2), "cpu", quick=True).batches == (1, 3, 12, 48)
    assert len(Plan.of(64, 1024, (0, 2), "cuda").places) == 3 * 10
    with pytest.raises(EngineError, match="leave no room"):
        Plan.of(64, 128, (0, 1, 2, 3, 5), "cpu")
    assert Plan.of(4, 1024, (0, 2), "cpu", quick=True).batches == (1, 2, 4)  # a fit needs three
    with pytest.raises(EngineError, match="max_running_requests=3: at least 4 needed"):
        Plan.of(3, 1024, (0, 2), "cpu")


def test_cells_share_their_contexts():
    readings = {
        (batch, 32): [{"0.plain": 1.0, "0.prefill": 2.0, "0.catch_up": 0.5, "1.cycle": 2.0, "context": context}]
        for batch, context in ((1, 50.0), (8, 54.0))
    }
    for reading in readings.values():
        reading[0] |= {"1.draft": 0.1, "1.verify": 1.0, "1.extend": 0.2}
    cells = cells_of(readings)
    assert [(cell.batch, cell.context, cell.shape, cell.decodes) for cell in cells[:3]] == [
        (1, 32, OFF, False),
        (1, 52, OFF, True),
        (1, 52, chain(1), True),
    ]
    assert {cell.context for cell in cells if cell.decodes} == {52}


class Tree:
    """An engine with passes of 2.4 tokens in 0.3 s; the first token of a response takes 0.3 s as well."""

    def submit(self, requests):
        self.tokens = requests[0].sampling.max_new_tokens
        self.count = len(requests)
        return self

    def collect(self):
        passes = round(self.tokens / 2.4)
        self.clock.now += 0.3 * (1 + passes)
        sample = Sample("", [], [], [], "length", "", "", verify_count=passes)
        return [sample] * self.count


class Clock:
    now = 0.0

    def perf_counter(self):
        return self.now


def test_trees_are_timed_from_outside(tmp_path, monkeypatch):
    profile = measure(MadeUp(), PLAN, IDENTITY, SAMPLING, 512, tmp_path / "p.json", lambda *_: None)
    engine = Tree()
    engine.clock = Clock()
    monkeypatch.setattr("respec_trainer.speculation.profiling.trees.time", engine.clock)
    cells = tree_cells(engine, Shape(3, 2, 6), profile, SAMPLING, 512, 2, 10.0, lambda *_: None)
    assert len(cells) == 7 and engine.tokens == TOKENS
    assert all(cell.times["cycle"].seconds == pytest.approx([0.3, 0.3]) for cell in cells)
    hurried = tree_cells(engine, Shape(3, 2, 6), profile, SAMPLING, 512, 2, 0.01, lambda *_: None)
    assert [len(cell.times["cycle"].seconds) for cell in hurried] == [1] * 7, "no repeat begins once the time is used"
    tree = json.loads(cells[0].model_dump_json())
    assert tree["shape"] == [3, 2, 6]
    assert fit_costs(profile.model_copy(update={"cells": profile.cells + cells})) == fit_costs(profile)
