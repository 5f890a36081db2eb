"""Prompts from JSONL or parquet files, tokenized, and a seeded stream of them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from respec_trainer.config import DataConfig
from respec_trainer.errors import ConfigError, DataError


@dataclass(frozen=True)
class Prompt:
    """One question. `key` is its row in the file, `text` what the model reads, `answer` the reference solution.

    `row` holds the row's other columns, for rewards.
    """

    key: str
    ids: tuple[int, ...]
    text: str
    answer: str
    row: Mapping[str, Any] = field(default_factory=dict, hash=False)


class PromptSet(Sequence[Prompt]):
    """The prompts of a file that fit; `dropped` is how many were longer than `limit` tokens."""

    def __init__(self, prompts: list[Prompt], dropped: int, limit: int):
        self._prompts, self.dropped, self.limit = prompts, dropped, limit

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index):
        return self._prompts[index]


def load_prompts(config: DataConfig, tokenizer, limit: int) -> PromptSet:
    """Read, template and tokenize the prompts of `data.path`; those longer than `limit` tokens are dropped and counted.

    Raises DataError if the file is missing, malformed or empty, naming the line, or if no prompt fits.
    """
    rows = list(read_rows(config))
    texts = [config.template.replace("{prompt}", row.prompt) for row in rows]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    prompts = [
        Prompt(str(row.line), tuple(ids), text, row.answer, row.others)
        for row, text, ids in zip(rows, texts, encoded, strict=True)
        if 0 < len(ids) <= limit
    ]
    if not prompts:
        shortest = min(len(ids) for ids in encoded)
        raise DataError(
            f"data.path: none of the {len(rows)} prompts of {config.path} has at most {limit} tokens (the shortest has "
            f"{shortest}); raise data.max_prompt_tokens, or lower rollout.sampling.max_new_tokens to make room"
        )
    return PromptSet(prompts, len(rows) - len(prompts), limit)


class DataRow(NamedTuple):
    """One row of a data file; `line` counts from 1, `others` are the columns that are neither prompt nor answer."""

    line: int
    prompt: str
    answer: str
    others: Mapping[str, Any]


NO_COLUMNS: Mapping[str, Any] = {}  # one for all rows, which are many


def read_rows(config: DataConfig) -> Iterator[DataRow]:
    """Yield every row. Raises DataError naming file and line.

    The other columns hold what JSON can hold. Columns of other types in a parquet file (times, decimals, bytes such as
    images) are left out: no reward could be given them by another process or host.
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


def check_tokenizer_fits(tokenizer, hf_config, folder: str) -> None:
    """Raise ConfigError if the tokenizer knows ids that the model has no embedding for."""
    if len(tokenizer) > hf_config.vocab_size:
        raise ConfigError(
            f"model.path: the tokenizer in {folder} has {len(tokenizer)} tokens, but the model's vocab_size is "
            f"{hf_config.vocab_size}; they do not belong together"
        )


class PromptStream:
    """Endless prompts, each epoch a new order that depends only on the seed and the epoch."""

    def __init__(self, prompts: Sequence[Prompt], seed: int, shuffle: bool = True):
        self.prompts, self.seed, self.shuffle = prompts, seed, shuffle
        self.epoch, self.position = 0, 0
        self._order = self._shuffled()

    def next(self, count: int) -> list[Prompt]:
        """The next `count` prompts; where an epoch ends, the next one begins."""
        taken = []
        while len(taken) < count:
            if self.position == len(self.prompts):
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._shuffled()
            part = self._order[self.position : self.position + count - len(taken)]
            self.position += len(part)
            taken += [self.prompts[i] for i in part]
        return taken

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position} | self._identity()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the stream that gave `state` was.

        Raises DataError for a stream of another seed, order or prompts: its position would mean others.
        """
        for key, value in self._identity().items():
            if state[key] != value:
                raise DataError(
                    f"the run was at prompt {state['position']} of epoch {state['epoch']} of a stream whose {key} is "
                    f"{state[key]}, here it is {value}: give it the same data.path, data.template, data.shuffle and "
                    "run.seed, or start a new run (checkpoint.resume=never)"
                )
        self.epoch, self.position = state["epoch"], state["position"]
        self._order = self._shuffled()

    def _identity(self) -> dict[str, Any]:
        """What makes a position mean the same prompts again."""
        return {"seed": self.seed, "shuffle": self.shuffle, "prompts": len(self.prompts), "digest": self._digest}

    @cached_property
    def _digest(self) -> str:
        content = xxhash.xxh3_64()
        for prompt in self.prompts:
            content.update(f"{prompt.key}\0{prompt.text}\0{prompt.answer}\0".encode())
            content.update(json.dumps(prompt.row, sort_keys=True).encode() if prompt.row else b"")
        return content.hexdigest()

    def _shuffled(self) -> list[int]:
        order = list(range(len(self.prompts)))
        if self.shuffle:
            random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
        return order


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
    """Whether values of an Arrow type are what JSON can hold: texts, numbers, booleans, null, and nestings of them."""
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
