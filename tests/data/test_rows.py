"""data/rows.py: files that can be read, and errors with the line for files that cannot."""

from __future__ import annotations

import json
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from respec_trainer.config import DataConfig
from respec_trainer.data.rows import read_rows
from respec_trainer.errors import DataError

ROWS = [{"question": f"What is {i} + {i}?", "answer": f"#### {2 * i}"} for i in range(2)]


def config(path, **keys) -> DataConfig:
    return DataConfig(path=str(path), prompts_per_step=2, **keys)


def write(path: Path, lines) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_parquet_columns_that_json_cannot_hold_are_left_out(tmp_path):
    others = {"level": 3, "extra_info": {"index": 1, "tags": ["x"]}, "nothing": None}
    strange = {"image": b"bytes", "when": datetime(2026, 1, 1), "price": Decimal("1.5"), "mixed": [{"raw": b"x"}]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROWS[0] | others | strange]), tmp_path / "rows.parquet")
    (row,) = read_rows(config(tmp_path / "rows.parquet"))
    assert row == (1, ROWS[0]["question"], "#### 0", others)
    with pytest.raises(DataError, match="line 1: column 'when' is datetime, not text"):
        list(read_rows(config(tmp_path / "rows.parquet", answer_column="when")))


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], "no rows"),
        ([ROWS[0], "{broken"], "line 2: not valid JSON"),
        ([ROWS[0], ROWS[1], {"question": "q"}], "line 3: no column 'answer'; it has 'question'"),
        ([{"question": 7, "answer": "7"}], "line 1: column 'question' is int"),
        (["[1, 2]"], "line 1: expected an object"),
    ],
)
def test_malformed_files_name_the_line(tmp_path, lines, words):
    with pytest.raises(DataError, match=words):
        list(read_rows(config(write(tmp_path / "r.jsonl", lines))))


def test_files_that_are_not_there_or_not_data(tmp_path):
    with pytest.raises(DataError, match="no file"):
        list(read_rows(config(tmp_path / "absent.jsonl")))
    with pytest.raises(DataError, match="neither"):
        list(read_rows(config(write(tmp_path / "r.csv", ["a,b"]))))
    with pytest.raises(DataError, match="not a parquet file"):
        list(read_rows(config(write(tmp_path / "r.parquet", ["text"]))))


def test_blank_lines_are_passed_over_and_counted(tmp_path):
    rows = list(read_rows(config(write(tmp_path / "r.jsonl", [ROWS[0], "", "  ", ROWS[1]]))))
    assert [row.line for row in rows] == [1, 4]


def test_text_is_utf_8_whatever_the_locale(tmp_path):
    (tmp_path / "r.jsonl").write_bytes('{"question": "Où?", "answer": "25 €"}\n'.encode())
    ((_, question, answer, others),) = read_rows(config(tmp_path / "r.jsonl"))
    assert (question, answer, others) == ("Où?", "25 €", {})
