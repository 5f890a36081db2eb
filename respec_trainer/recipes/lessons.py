"""Lessons: batches of word problems and of bare equations for supervised learning."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from respec_trainer.data.word_problems import Problem, equations

IGNORED = -100  # a target that is not learned, torch's default ignore_index
POOL = 16  # batches drawn together and sorted by length, so that little of a batch is padding
SHEET_TOKENS = 64  # least length of a row of equations


@dataclass(frozen=True)
class Row:
    ids: list[int]
    targets: list[int]  # at each position its id, or IGNORED


class Lessons:
    """An endless iterator of (ids [B, S], targets [B, S]), right-padded. Only answers and results are targets."""

    def __init__(self, tokenizer, problems, teaching, problem: Callable[[int], Problem], seed: int):
        """`problems` and `teaching` are the recipe's sections; `problem(i)` is the i-th problem to teach."""
        self.tokenizer, self.template = tokenizer, problems.template
        self.rows, self.sheets, self.direct = teaching.problems, teaching.sheets, teaching.direct
        self.problem, self.random, self.taken = problem, random.Random(seed), 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            rows = sorted(self._problem_rows(self._take(self.rows * POOL)), key=lambda row: len(row.ids))
            batches = [rows[i : i + self.rows] for i in range(0, len(rows), self.rows)]
            sheets = self._sheet_rows(self.sheets * POOL)
            self.random.shuffle(batches)
            for i, batch in enumerate(batches):
                yield self._collate(batch + sheets[i * self.sheets : (i + 1) * self.sheets])

    def _take(self, count: int) -> list[Problem]:
        self.taken += count
        return [self.problem(i) for i in range(self.taken - count, self.taken)]

    def _problem_rows(self, problems: list[Problem]) -> list[Row]:
        prompts = self._encode([self.template.replace("{prompt}", problem.question) for problem in problems])
        answers = self._encode([self._answer(problem) for problem in problems])
        end = [self.tokenizer.eos_token_id]
        return [
            Row(prompt + answer + end, [IGNORED] * len(prompt) + answer + end)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def _answer(self, problem: Problem) -> str:
        """Return the worked solution or, with probability `direct`, its last line alone."""
        return problem.answer.splitlines()[-1] if self.random.random() < self.direct else problem.answer

    def _sheet_rows(self, count: int) -> list[Row]:
        """Make rows of equations, one after the other; the results after the equals signs are the targets."""
        rows = []
        while len(rows) < count:
            pairs = [pair for problem in self._take(8 * POOL) for pair in equations(problem)]
            left, right = (self._encode(list(side)) for side in zip(*pairs, strict=True))
            newline = self._encode(["\n"])[0]
            row = Row([], [])
            for question, result in zip(left, right, strict=True):
                row.ids.extend(question + result + newline)
                row.targets.extend([IGNORED] * len(question) + result + newline)
                if len(row.ids) >= SHEET_TOKENS:
                    rows.append(row)
                    row = Row([], [])
        return rows[:count]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def _collate(self, rows: list[Row]) -> tuple[Tensor, Tensor]:
        length = max(len(row.ids) for row in rows)
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        targets = torch.full((len(rows), length), IGNORED)
        for i, row in enumerate(rows):
            ids[i, : len(row.ids)] = torch.tensor(row.ids)
            targets[i, : len(row.ids)] = torch.tensor(row.targets)
        return ids, targets
