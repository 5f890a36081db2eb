"""Prompts: the tokenized rows of a data file, and a seeded stream of them."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import xxhash

from respec_trainer.config import DataConfig
from respec_trainer.data.rows import read_rows
from respec_trainer.errors import ConfigError, DataError


@dataclass(frozen=True)
class Prompt:
    """One question. `key` is its line in the file, `text` the text for the model, `answer` the reference solution.

    `row` holds the row's other columns, for rewards.
    """

    key: str
    ids: tuple[int, ...]
    text: str
    answer: str
    row: Mapping[str, Any] = field(default_factory=dict, hash=False)


class PromptSet(Sequence[Prompt]):
    """The prompts of a file with at most `limit` tokens; `dropped` is the number of longer ones."""

    def __init__(self, prompts: list[Prompt], dropped: int, limit: int):
        self._prompts, self.dropped, self.limit = prompts, dropped, limit

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index):
        return self._prompts[index]


def load_prompts(config: DataConfig, tokenizer, limit: int) -> PromptSet:
    """Read, template and tokenize the prompts of `data.path`; drop and count those longer than `limit` tokens.

    Raises DataError, with the line, if the file is missing, malformed or empty, or if no prompt is short enough.
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


def check_tokenizer_fits(tokenizer, hf_config, folder: str) -> None:
    """Raise ConfigError if the tokenizer has ids that the model has no embedding for."""
    if len(tokenizer) > hf_config.vocab_size:
        raise ConfigError(
            f"model.path: the tokenizer in {folder} has {len(tokenizer)} tokens, but the model's vocab_size is "
            f"{hf_config.vocab_size}; they do not belong together"
        )


class PromptStream:
    """An endless stream of prompts. Each epoch has a new order, which depends only on the seed and the epoch."""

    def __init__(self, prompts: Sequence[Prompt], seed: int, shuffle: bool = True):
        self.prompts, self.seed, self.shuffle = prompts, seed, shuffle
        self.epoch, self.position = 0, 0
        self._order = self._shuffled()

    def next(self, count: int) -> list[Prompt]:
        """Take the next `count` prompts; after the end of an epoch the next one begins."""
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
        """Continue at the position of the stream that returned `state`.

        Raises DataError for a stream with another seed, order or prompts: its position would mean other prompts.
        """
        for key, value in self._identity().items():
            if state[key] != value:
                raise DataError(
                    f"the run was at prompt {state['position']} of epoch {state['epoch']} of a stream whose {key} is "
                    f"{state[key]}, but now it is {value}: give the same data.path, data.template, data.shuffle and "
                    "run.seed, or start a new run (checkpoint.resume=never)"
                )
        self.epoch, self.position = state["epoch"], state["position"]
        self._order = self._shuffled()

    def _identity(self) -> dict[str, Any]:
        """The properties that must be equal for a position to mean the same prompts."""
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
