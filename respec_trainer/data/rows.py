"""The rows of a JSONL or parquet file: prompt, reference answer, and the other columns."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from respec_trainer.config import DataConfig
from respec_trainer.errors import DataError


class DataRow(NamedTuple):
    """One row of a data file; `line` counts from 1, `others` holds the columns other than prompt and answer."""

    line: int
    prompt: str
    answer: str
    others: Mapping[str, Any]


NO_COLUMNS: Mapping[str, Any] = {}  # shared by all rows, to save memory


def read_rows(config: DataConfig) -> Iterator[DataRow]:
    """Yield every row. Raises DataError, with file and line, for a missing or malformed file.

    The other columns hold values that JSON can hold. Columns of other types in a parquet file (times, decimals, bytes
    such as images) are left out, because they could not be sent to a reward in another process or host.
    """
    path = Path(config.path)
    if not path.is_file():
        raise DataError(f"data.path: no file {path}")
    readers: dict[str, Callable] = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise DataError(f"data.path: {path} is neither .jsonl nor .parquet")
    empty, used = True, (config.prompt_column, config.answer_column)
    for line, row in readers[path.suffix](path, used):
        texts = [_text(row, column, path, line) for column in used]
        yield DataRow(line, *texts, {name: row[name] for name in row if name not in used} or NO_COLUMNS)
        empty = False
    if empty:
        raise DataError(f"data.path: {path} holds no rows")


def _read_jsonl(path: Path, used: Sequence[str]) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8") as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                yield line, json.loads(text)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {line}: not valid JSON ({error.msg})") from error


def _read_parquet(path: Path, used: Sequence[str]) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(path)
        columns = [column.name for column in schema if column.name in used or _is_plain(column.type)]
        table = pyarrow.parquet.read_table(path, columns=columns)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} is not a parquet file: {error}") from error
    yield from enumerate(table.to_pylist(), 1)


def _is_plain(kind: Any) -> bool:
    """Return whether JSON can hold values of an Arrow type: text, numbers, booleans, null, and nestings of them."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    if types.is_nested(kind):
        return not types.is_map(kind) and all(_is_plain(kind.field(index).type) for index in range(kind.num_fields))
    tests = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean)
    return types.is_null(kind) or any(test(kind) for test in tests)


def _text(row: Any, column: str, path: Path, line: int) -> str:
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {line}: expected an object with columns, found {type(row).__name__}")
    if column not in row:
        raise DataError(f"{path}, line {line}: no column {column!r}; it has {', '.join(map(repr, row)) or 'none'}")
    if not isinstance(row[column], str):
        raise DataError(f"{path}, line {line}: column {column!r} is {type(row[column]).__name__}, not text")
    return row[column]
