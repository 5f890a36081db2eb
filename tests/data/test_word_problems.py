"""data/word_problems.py: right arithmetic, equal problems from equal arguments, and splits that share no question."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from fractions import Fraction

import pytest

from respec_trainer.data.word_problems import (
    LIMIT,
    equations,
    make_problem,
    split_of,
    write_jsonl,
)

MIX = {1: 0.25, 2: 0.25, 3: 0.25, 4: 0.25}


def problems(seed: int, mix, largest: int = 30, split: str = "train"):
    """The problems 0, 1, ... of a seed, without end."""
    return (make_problem(seed, index, mix, largest, split) for index in itertools.count())


SOME = list(itertools.islice(problems(0, MIX, largest=60), 2000))


def value(expression: str) -> Fraction:
    left, sign, right = re.fullmatch(r"(\d+) ([-+*/]) (\d+) =", expression).groups()
    a, b = Fraction(left), Fraction(right)
    return {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}[sign]


def test_every_step_is_right_and_leads_to_the_answer():
    for problem in SOME:
        pairs = equations(problem)
        assert len(pairs) == problem.steps
        results = [int(right.strip().rstrip(".")) for _, right in pairs]
        assert [value(left) for left, _ in pairs] == results
        assert all(0 < result < LIMIT for result in results)
        assert problem.answer.splitlines()[-1] == f"#### {results[-1]}"
        # A step continues from the result before it.
        for (left, _), before in zip(pairs[1:], results, strict=False):
            assert int(left.split()[0]) == before


def test_the_question_states_every_number_that_the_solution_uses():
    for problem in SOME:
        stated = Counter(map(int, re.findall(r"\d+", problem.question)))
        first, *_ = equations(problem)
        used = [int(left.split()[2]) for left, _ in equations(problem) if left.split()[1] in "+-"]
        used.append(int(first[0].split()[0]))
        assert not Counter(used) - stated, problem


# The words of a question for each kind of event.
GAINED = r"buys|finds|A friend gives|earns|wins|arrive|A bus brings"
LOST = r"gives away|sells \d|loses|spends \d|pays|leave|A bus takes"
WORDS = {"+": GAINED, "-": LOST, "*": r"doubles|boxes with|hours for|tents with", "/": r"half of|Half of"}


def test_the_question_tells_what_the_solution_computes():
    for problem in SOME:
        signs = Counter(left.split()[1] for left, _ in equations(problem))
        told = {sign: len(re.findall(words, problem.question)) for sign, words in WORDS.items()}
        assert told == {sign: signs[sign] for sign in WORDS}, problem


def test_what_is_halved_is_even_and_more_than_three():
    halved = {int(left.split()[0]) for problem in SOME for left, _ in equations(problem) if "/" in left}
    assert min(halved) == 4 and all(number % 2 == 0 for number in halved)


def test_difficulty_follows_the_mix():
    counts = Counter(problem.steps for problem in problems_of({1: 3, 3: 1}, 2000))
    assert set(counts) == {1, 3}
    # 1500 expected; five standard deviations of a binomial are 97.
    assert abs(counts[1] - 1500) < 97


def problems_of(mix, count):
    return list(itertools.islice(problems(3, mix), count))


def test_numbers_in_questions_stay_below_the_largest():
    for problem in itertools.islice(problems(1, MIX, largest=9), 500):
        numbers = list(map(int, re.findall(r"\d+", problem.question)))
        assert max(numbers) <= 9 and min(numbers) >= 2


def test_a_problem_depends_on_seed_and_index_alone():
    assert [make_problem(0, i, MIX, 60) for i in (7, 3, 7)] == [SOME[7], SOME[3], SOME[7]]
    assert make_problem(1, 7, MIX, 60) != SOME[7]


def test_questions_are_varied():
    assert len({problem.question for problem in SOME}) > 0.95 * len(SOME)
    for words in ("dollars", "camp", "boxes", "doubles", "half of", "gives", "spends", "A bus"):
        assert sum(words in problem.question for problem in SOME) > 20, words


@pytest.mark.parametrize("seed", [0, 1])
def test_splits_never_share_a_question_whatever_their_seeds(seed):
    # One-step problems with small numbers: few enough that seeds do repeat each other's questions.
    train = {p.question for p in itertools.islice(problems(0, {1: 1}, 4), 3000)}
    test = {p.question for p in itertools.islice(problems(seed, {1: 1}, 4, split="test"), 1000)}
    again = {p.question for p in itertools.islice(problems(5, {1: 1}, 4), 3000)}
    assert train & again and not train & test
    assert all(split_of(question) == "test" for question in test)


def test_jsonl_is_gsm8k_format(tmp_path):
    write_jsonl(tmp_path / "p.jsonl", SOME[:3])
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert rows == [{"question": p.question, "answer": p.answer} for p in SOME[:3]]


@pytest.mark.parametrize("mix", [{}, {0: 1.0}, {5: 1.0}, {1: -1.0, 2: 2.0}, {1: 0.0}, {1: float("nan")}])
def test_a_mix_that_cannot_be_drawn_from(mix):
    with pytest.raises(ValueError, match="mix"):
        make_problem(0, 0, mix)
