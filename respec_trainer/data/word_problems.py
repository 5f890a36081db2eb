"""Arithmetic word problems with worked solutions, in GSM8K's format: a question, and an answer ending in `#### 42`.

A problem is a short story about one number: an opening, then events that add to it, subtract from it, double or halve
it. Its difficulty is its number of arithmetic steps. The wording of the solution follows from the question, so only the
arithmetic can be wrong: supervised learning can teach a part of this task, and reinforcement learning the rest.

The text of a question alone decides whether it belongs to the train or the test split, so the two splits never share a
question, whatever their seeds.
"""

from __future__ import annotations

import json
import random
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Split = Literal["train", "test"]
MARKER = "####"
MAX_STEPS = 4
LIMIT = 1000  # every number in a problem is below this
TEST_SHARE = 8  # one question in this many belongs to the test split

NAMES = ("Ann", "Bob", "Cara", "Dan", "Eve", "Finn", "Gia", "Hal")
THINGS = ("apples", "books", "cards", "coins", "pens", "shells")


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str  # the worked solution, its last line `#### N`
    steps: int


@dataclass(frozen=True)
class Story:
    """The sentences of one kind of story. Fields: {name}, {thing}, numbers {a} and {b}, a count {c} of equal groups.

    Gains and losses are pairs of the question's sentence and the solution's word for it.
    """

    unit: str  # what is counted
    start: str
    groups: str
    gains: tuple[tuple[str, str], ...]
    losses: tuple[tuple[str, str], ...]
    double: str
    halve: str
    ask: str


STORIES = (
    Story(
        unit="{thing}",
        start="{name} has {a} {thing}.",
        groups="{name} has {c} boxes with {a} {thing} each.",
        gains=(
            ("{name} buys {b} more {thing}.", "buying"),
            ("{name} finds {b} more {thing}.", "finding"),
            ("A friend gives {name} {b} {thing}.", "getting"),
        ),
        losses=(
            ("{name} gives away {b} {thing}.", "giving away"),
            ("{name} sells {b} of the {thing}.", "selling"),
            ("{name} loses {b} of the {thing}.", "losing"),
        ),
        double="Then the number of {thing} doubles.",
        halve="{name} sells half of the {thing}.",
        ask="How many {thing} does {name} have now?",
    ),
    Story(
        unit="dollars",
        start="{name} has {a} dollars.",
        groups="{name} works {c} hours for {a} dollars an hour.",
        gains=(("{name} earns {b} dollars.", "earning"), ("{name} wins {b} dollars.", "winning")),
        losses=(("{name} spends {b} dollars.", "spending"), ("{name} pays {b} dollars for {thing}.", "paying")),
        double="Then the money doubles.",
        halve="{name} spends half of the money.",
        ask="How many dollars does {name} have in the end?",
    ),
    Story(
        unit="people",
        start="There are {a} people in the camp of {name}.",
        groups="{name} runs a camp of {c} tents with {a} people each.",
        gains=(("{b} people arrive.", "adding"), ("A bus brings {b} people.", "bringing")),
        losses=(("{b} people leave.", "losing"), ("A bus takes {b} people home.", "taking home")),
        double="Then the number of people doubles.",
        halve="Half of the people go home.",
        ask="How many people are there in the camp?",
    ),
)


def make_problem(seed: int, index: int, mix: Mapping[int, float], largest: int = 30, split: Split = "train") -> Problem:
    """Make the `index`-th problem of a stream. Equal arguments always give equal problems.

    `mix` maps numbers of steps, 1 to 4, to their weights; `largest` limits the numbers in the question (results stay
    below 1000). Raises ValueError for a `mix` or `largest` that cannot be used.
    """
    check_mix(mix)
    if not 4 <= largest <= 100:
        raise ValueError(f"largest must lie in 4..100, not {largest}")
    rng = random.Random(f"{seed}/{index}")
    while True:
        steps = rng.choices(list(mix), list(mix.values()))[0]
        problem = _draw(rng, steps, largest)
        if split_of(problem.question) == split:
            return problem


def check_mix(mix: Mapping[int, float]) -> None:
    """Raise ValueError unless `mix` maps numbers of steps from 1 to 4 to weights >= 0, not all 0."""
    if not mix or any(steps not in range(1, MAX_STEPS + 1) for steps in mix):
        raise ValueError(f"a mix weighs numbers of steps from 1 to {MAX_STEPS}, not {list(mix)}")
    if any(not 0 <= weight < float("inf") for weight in mix.values()) or not sum(mix.values()) > 0:
        raise ValueError(f"a mix needs weights >= 0 with a sum > 0, not {list(mix.values())}")


def split_of(question: str) -> Split:
    """The split of a question, computed from its text alone."""
    return "test" if zlib.crc32(question.encode()) % TEST_SHARE == 0 else "train"


def equations(problem: Problem) -> list[tuple[str, str]]:
    """The equations of a worked solution, as pairs such as ("48 + 5 =", " 53.")."""
    return re.findall(r"(\d+ [-+*/] \d+ =)( \d+\.)", problem.answer)


def write_jsonl(path: Path, items: Iterable[Problem]) -> None:
    """Write problems as GSM8K does: one JSON object a line, with `question` and `answer`."""
    lines = (json.dumps({"question": item.question, "answer": item.answer}) for item in items)
    path.write_text("".join(line + "\n" for line in lines))


def _draw(rng: random.Random, steps: int, largest: int) -> Problem:
    story, words = rng.choice(STORIES), {"name": rng.choice(NAMES), "thing": rng.choice(THINGS)}
    words["unit"] = story.unit.format(**words)
    value, sentences, worked = _opening(rng, story, words, largest)
    while len(worked) < steps:
        value, sentence, line = _event(rng, story, words, value, largest)
        sentences.append(sentence)
        worked.append(line)
    sentences.append(story.ask.format(**words))
    return Problem(" ".join(sentences), "\n".join([*worked, f"{MARKER} {value}"]), steps)


def _opening(rng: random.Random, story: Story, words: dict, largest: int) -> tuple[int, list[str], list[str]]:
    """Draw the first number, the question's sentences for it, and the solution's lines for it (none, or a product)."""
    a = rng.randint(2, largest)
    if rng.random() < 0.5:
        return a, [story.start.format(a=a, **words)], []
    a, c = rng.randint(2, largest), rng.randint(2, 9)
    worked = f"First, {c} times {a} {words['unit']} are {c} * {a} = {a * c}."
    return a * c, [story.groups.format(a=a, c=c, **words)], [worked]


def _event(rng: random.Random, story: Story, words: dict, value: int, largest: int) -> tuple[int, str, str]:
    """Draw one step: the new number, the question's sentence and the solution's line."""
    kinds = ["gain"] * 3 * (value + largest < LIMIT) + ["loss"] * 3 * (value > 3)
    kinds += ["double"] * (2 * value < LIMIT) + ["halve"] * (value > 3 and value % 2 == 0)
    kind = rng.choice(kinds)
    unit = words["unit"]
    if kind == "double":
        return 2 * value, story.double.format(**words), f"After doubling, the {unit} are {value} * 2 = {2 * value}."
    if kind == "halve":
        worked = f"After halving, the {unit} left are {value} / 2 = {value // 2}."
        return value // 2, story.halve.format(**words), worked
    sentence, label = rng.choice(story.gains if kind == "gain" else story.losses)
    b = rng.randint(2, largest if kind == "gain" else min(largest, value - 1))
    if kind == "gain":
        worked = f"After {label} {b} more {unit}, the {unit} are {value} + {b} = {value + b}."
        return value + b, sentence.format(b=b, **words), worked
    worked = f"After {label} {b} {unit}, the {unit} left are {value} - {b} = {value - b}."
    return value - b, sentence.format(b=b, **words), worked
