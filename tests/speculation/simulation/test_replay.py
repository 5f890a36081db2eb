"""speculation/simulation/replay.py and tools/simulate_rollout.py: policies by name, compared on a recorded trace."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from respec_trainer.errors import ConfigError
from respec_trainer.speculation.shape import Shape, chain
from respec_trainer.speculation.simulation.replay import as_data, candidates_of, compare, parse_acceptance, policy_named
from respec_trainer.speculation.simulation.simulator import Setting
from respec_trainer.speculation.simulation.trace import Trace, TraceRow, save_trace
from tests.support.speculation import CPU, profile_of, skewed_trace

REPOSITORY = Path(__file__).parents[3]


def test_policies_side_by_side():
    trace, setting = skewed_trace(24), Setting(slots=16)
    rows = as_data(compare(trace, CPU, [0, 1, 3], "adaptive", setting))
    assert list(rows) == ["adaptive", "greedy", "weighted", "critical", "off", "s=1", "s=3"]
    assert rows["off"]["speedup"] == 1.0 and rows["off"]["off_fraction"] == 1.0
    fastest = min(row["makespan"] for name, row in rows.items() if name != "adaptive")
    assert all(row["regret"] == pytest.approx(row["makespan"] / fastest - 1) for row in rows.values())
    assert all(row["tokens"] == trace.tokens for row in rows.values())
    assert rows["adaptive"]["speedup"] > 1.2
    assert list(compare(trace, CPU, [0, 1], "off", setting)) == ["off", "greedy", "weighted", "critical", "s=1"]
    limited = as_data(compare(trace, CPU, [0, 1], "s=1<=4", setting))
    assert "s=1<=4" in limited and min(row["regret"] for row in limited.values()) <= 0.0


def test_regret_is_against_the_best_of_all_references():
    """Long responses keep few drafts here. What is fastest on average is then slow for the last response."""
    generator = np.random.default_rng(3)
    size, own = generator.standard_normal((2, 64))
    length = np.minimum(np.exp(5 + size).astype(int) + 2, 2000)
    kept = 1 / (1 + np.exp(0.7 * size - 0.7 * own - 0.4))
    trace = Trace(np.full(64, 50), length, np.arange(64), kept[:, None])
    rows = as_data(compare(trace, CPU, [0, 1, 2, 3, 5], "adaptive", Setting()))
    assert rows["greedy"]["regret"] > 0.02 and rows["critical"]["regret"] < 0.01
    assert rows["greedy"]["regret"] > rows["weighted"]["regret"]
    named = [row["regret"] for name, row in rows.items() if name != "adaptive"]
    assert min(named) == 0.0 and rows["adaptive"]["regret"] > 0.02


def test_each_engine_has_a_policy_of_its_own():
    make = policy_named("adaptive", CPU, [0, 1, 3], skewed_trace(8), Setting())
    one, other = make(), make()
    assert one.times is other.times and one.estimate is not other.estimate and one.policy is not other.policy


@pytest.mark.parametrize("name", ["s=2", "s=", "oracle", "s=-1", "s=1<="])
def test_names_of_no_policy(name):
    with pytest.raises(ConfigError, match="steps \\[1, 3\\] only|no policy"):
        policy_named(name, CPU, [0, 1, 3], skewed_trace(8), Setting())


def test_none_above_a_batch_size():
    trace = skewed_trace(12)
    outcome = compare(trace, CPU, [0, 3], "s=3<=8", Setting())["s=3<=8"]
    assert all(span.steps == (3 if span.batch <= 8 else 0) for span in outcome.spans[0])


def test_only_chains_are_switched():
    assert candidates_of(profile_of(CPU, batches=(1,), shapes=[chain(2), Shape(2, 4, 8), chain(4)])) == [0, 2, 4]


def test_acceptance_on_the_command_line():
    assert parse_acceptance("0.8, 0.5") == [0.8, 0.5] and parse_acceptance(None) is None
    for text in ("", "0.8,x", "1.2"):
        with pytest.raises(ConfigError, match="not a list of probabilities"):
            parse_acceptance(text)


def test_the_tool(tmp_path):
    profile_of(CPU, noise=0.03).save(tmp_path / "profile.json")
    rows = [
        TraceRow(prompt_tokens=20, response_tokens=30 * k, group=k // 2, accept_histogram=[4, 3, 2, 6])
        for k in range(1, 9)
    ]
    save_trace(rows, tmp_path / "trace.jsonl")

    def tool(*more):
        files = ["--profile", tmp_path / "profile.json", "--lengths", tmp_path / "trace.jsonl"]
        command = [sys.executable, "tools/simulate_rollout.py", *files, *more]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)

    done = tool("--policy", "s=3", "--engines", "2", "--balance", "queue", "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    assert "8 responses, 1,080 tokens, 2 x 64 slots" in done.stdout and "critical" in done.stdout
    outcome = json.loads((tmp_path / "out.json").read_text())
    assert outcome["s=3"]["tokens"] == 1080 and outcome["s=3"]["speedup"] > 1
    refused = tool("--policy", "s=4")
    assert refused.returncode == 2 and "chains of steps [1, 2, 3, 5] only" in refused.stderr
