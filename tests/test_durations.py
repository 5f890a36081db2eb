"""tests/durations.py: the longest files come first, their tests stay in order, and a run writes the table."""

from __future__ import annotations

import json

from tests import durations


def test_the_longest_files_come_first_and_their_tests_in_order():
    nodeids = [f"tests/{name}.py::test_{test}" for name in ("short", "new", "long") for test in ("b", "a")]
    order = durations.longest_first(nodeids, {"short.py": 0.1, "long.py": 60.0})
    assert [nodeids[position] for position in order] == nodeids[4:] + nodeids[2:4] + nodeids[:2]


def test_a_run_refreshes_what_it_measured_and_drops_what_is_gone(tmp_path, monkeypatch):
    table = tmp_path / "durations.json"
    table.write_text(json.dumps({"kept.py": 3.0, "gone.py": 9.0, "folder/measured.py": 7.0}))
    (tmp_path / "folder").mkdir()
    for name in ("kept.py", "folder/measured.py"):
        (tmp_path / name).touch()
    monkeypatch.setattr(durations, "TABLE", table)
    durations.save({"folder/measured.py": 1.26})
    assert durations.load() == {"folder/measured.py": 1.3, "kept.py": 3.0}


def test_every_file_of_the_table_is_there():
    assert [name for name in durations.load() if not (durations.TABLE.parent / name).is_file()] == []
