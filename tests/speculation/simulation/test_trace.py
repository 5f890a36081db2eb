"""speculation/simulation/trace.py: traces that load, and errors that name line and field."""

from __future__ import annotations

import json

import numpy as np
import pytest

from respec_trainer.errors import DataError
from respec_trainer.speculation.simulation.trace import TraceRow, conditional, load_trace, save_trace

ROW = {"prompt_tokens": 5, "response_tokens": 9, "group": 0, "acceptance": [0.5, 0.4]}


def write(path, rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_a_trace_comes_back_from_its_file(tmp_path):
    rows = [TraceRow(**ROW), TraceRow(prompt_tokens=5, response_tokens=2, group=1, accept_histogram=[1, 1])]
    save_trace(rows, tmp_path / "t.jsonl")
    trace = load_trace(tmp_path / "t.jsonl")
    assert (trace.prompt.tolist(), trace.length.tolist(), trace.group.tolist()) == ([5, 5], [9, 2], [0, 1])
    assert len(trace) == 2 and trace.tokens == 11
    assert trace.acceptance.tolist() == [[0.5, 0.4], [0.5, 0.5]]  # deeper is like the last


def test_depths_that_a_histogram_never_reached_are_the_others(tmp_path):
    rows = [ROW | {"acceptance": None, "accept_histogram": counts} for counts in ([6, 0, 0], [2, 4, 4])]
    trace = load_trace(write(tmp_path / "t.jsonl", rows))
    assert trace.acceptance.tolist() == [[0.0, 0.5], [0.8, 0.5]]


def test_rows_without_drafts_need_a_default(tmp_path):
    rows = [ROW, ROW | {"acceptance": None}, ROW | {"acceptance": None, "accept_histogram": [0, 0]}]
    path = write(tmp_path / "t.jsonl", rows)
    assert load_trace(path, [0.9]).acceptance.tolist() == [[0.5, 0.4], [0.9, 0.9], [0.9, 0.9]]
    with pytest.raises(DataError, match="t.jsonl line 2: acceptance: no drafts"):
        load_trace(path)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{broken", "line 3: not valid JSON"),
        ("[1]", "line 3:\n.*object"),
        (ROW | {"response_tokens": 0}, "line 3:\n  response_tokens: .* greater than or equal to 1"),
        (ROW | {"response_tokens": 1.5}, "line 3:\n  response_tokens: .* integer"),
        (ROW | {"acceptance": [0.5, 1.2]}, "line 3:\n  acceptance.1: .* less than or equal to 1"),
        (ROW | {"acceptance": []}, "line 3:\n  acceptance: .* at least 1 item"),
        (ROW | {"accept_histogram": [1, -1], "acceptance": None}, "line 3:\n  accept_histogram.1: "),
        (ROW | {"accept_histogram": [1]}, "line 3:\n  acceptance: give it or accept_histogram, not both"),
        (ROW | {"tokens": 4}, "line 3:\n  tokens: Extra inputs"),
        ({"prompt_tokens": 5}, "line 3:\n  response_tokens: Field required\n  group: Field required"),
    ],
)
def test_malformed_lines_are_named(tmp_path, line, words):
    with pytest.raises(DataError, match=words):
        load_trace(write(tmp_path / "t.jsonl", [ROW, "", line]))


def test_files_that_are_not_there_or_empty(tmp_path):
    with pytest.raises(DataError, match="no length trace at"):
        load_trace(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="has no rows"):
        load_trace(write(tmp_path / "t.jsonl", [""]))


def test_the_acceptance_of_a_batch_is_that_of_its_survivors():
    acceptance = np.array([[1.0, 1.0], [0.0, 0.5]])
    assert conditional(acceptance) == [0.5, 1.0]  # responses that keep the first draft keep the second as well
    assert conditional(acceptance, np.array([1, 3])) == [0.25, 1.0]
    assert conditional(np.zeros((2, 2))) == [0.0, 0.0]
