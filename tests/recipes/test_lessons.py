"""recipes/lessons.py and tokenizer.py: the batches that a small actor learns from, and their targets."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from respec_trainer.compat.torchvision_cpu import define_torchvision_operators
from respec_trainer.data.word_problems import make_problem
from respec_trainer.recipes.lessons import IGNORED, Lessons
from respec_trainer.recipes.small_actor import ProblemRecipe, TeachingRecipe
from respec_trainer.recipes.tokenizer import train_tokenizer

MIX = {1: 0.5, 2: 0.5}


def problem(index):
    return make_problem(0, index, MIX)


@pytest.fixture(scope="module")
def tokenizer():
    define_torchvision_operators()
    return train_tokenizer((problem(i).question + "\n" + problem(i).answer for i in range(300)), 400)


def lessons(tokenizer, seed=0, **teaching):
    recipe = TeachingRecipe(**({"steps": 1, "problems": 4, "sheets": 2, "direct": 0.0} | teaching))
    return Lessons(tokenizer, ProblemRecipe(mix=MIX), recipe, problem, seed)


def texts(tokenizer, ids, targets):
    """Return (all tokens, the targets) of each row, as text."""
    pairs = []
    for row, target in zip(ids, targets, strict=True):
        kept = row[row != tokenizer.pad_token_id], target[target != IGNORED]
        pairs.append(tuple(tokenizer.decode(part) for part in kept))
    return pairs


def test_tokenizer_gives_back_every_text_and_keeps_digits_apart(tokenizer):
    text = "Ann has 1024 apples.\nÄ €5 – ok?"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert [tokenizer.decode([i]) for i in tokenizer("1024")["input_ids"]] == list("1024")
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) <= 400


def test_a_batch_holds_problems_and_sheets(tokenizer):
    ids, targets = next(iter(lessons(tokenizer)))
    assert ids.shape == targets.shape and len(ids) == 6
    learned = targets != IGNORED
    assert torch.equal(ids[learned], targets[learned])
    *worked, first, second = texts(tokenizer, ids, targets)
    for text, answer in worked:
        assert text.startswith("Q: ") and answer.endswith("</s>") and text.endswith(answer)
        assert re.fullmatch(r"(.* are \d+ . \d+ = \d+\.\n)+#### \d+</s>", answer)
    for text, answer in (first, second):
        equations = re.fullmatch(r"((\d+ [-+*/] \d+ = \d+\.)\n)+", text)
        assert equations and answer == "".join(re.findall(r"=( \d+\.\n)", text))


def test_a_share_of_the_answers_is_bare(tokenizer):
    for share, expected in ((0.0, 0), (1.0, 64)):
        rows = [
            pair
            for ids, targets in itertools.islice(lessons(tokenizer, sheets=0, direct=share), 16)
            for pair in texts(tokenizer, ids, targets)
        ]
        assert sum(answer.startswith("####") for _, answer in rows) == expected and len(rows) == 64


def test_lessons_repeat_with_their_seed_and_never_run_out(tokenizer):
    def take(seed):
        return [ids for ids, _ in itertools.islice(lessons(tokenizer, seed, direct=0.5), 40)]

    first, again, other = take(0), take(0), take(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first[0], first[16])
