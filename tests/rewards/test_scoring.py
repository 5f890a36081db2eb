"""rewards/scoring.py: each sample is scored once over all ranks, and all ranks hold the same results."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from respec_trainer.config import RewardConfig
from respec_trainer.errors import RewardError
from respec_trainer.rewards.contract import Score
from respec_trainer.rewards.scoring import Scorer, Share, as_tensor
from tests.support.processes.ranks import run_ranks
from tests.support.rewards import item, reward_file

GROUP = 2
ITEMS = [item(f"{prompt}{'ab'[i]}", prompt=str(prompt)) for prompt in range(3) for i in range(GROUP)]
# Each process draws other numbers, and writes down the items that it scores.
JUDGE = """
import os, pathlib, random
from respec_trainer.rewards.contract import Score

draws, here = random.Random(os.getpid()), pathlib.Path(__file__).parent

def judge(items):
    with (here / f"{os.getpid()}.txt").open("a") as file:
        file.write("".join(item.response + "\\n" for item in items))
    return [None if item.response == "1a" else Score(draws.random(), {"pid": os.getpid()}) for item in items]
"""
LAYOUTS = {"tp 2 x dp 1": (2, 2), "tp 1 x dp 2": (2, 1), "tp 2 x dp 2": (4, 2)}


def score_on_a_rank(config: RewardConfig, tp: int, times: int = 1):
    """This rank's process, and its results of every call, or its error."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    scorer = Scorer(config, Share(dist.get_world_size() // tp, rank // tp, rank % tp), dist.new_group(backend="gloo"))
    try:
        return os.getpid(), [scorer(ITEMS, GROUP) for _ in range(times)]
    except RewardError as error:
        return os.getpid(), str(error)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_agree_where_a_reward_differs_by_process(tmp_path, layout):
    ranks, tp = LAYOUTS[layout]
    answers = run_ranks(ranks, score_on_a_rank, reward_file(tmp_path, JUDGE, "judge"), tp, 2)
    pids, results = zip(*answers, strict=True)
    assert all(result == results[0] for result in results), "every rank holds the same numbers and parts"
    scored_by = {int(path.stem): path.read_text().split() for path in tmp_path.glob("*.txt")}
    everything = sorted(response for responses in scored_by.values() for response in responses)
    assert everything == sorted(2 * [item.response for item in ITEMS]), "each sample is scored once a call"
    assert set(scored_by) <= set(pids[::tp]), "by the first of the tensor-parallel ranks alone"
    assert len(scored_by) == ranks // tp, "in as many shares as there are copies of the model"
    for scores in results[0]:
        assert [score is None for score in scores] == [item.response == "1a" for item in ITEMS]
        for score, scored in zip(scores, ITEMS, strict=True):
            assert score is None or scored.response in scored_by[score.parts["pid"]]
    assert results[0][0] != results[0][1], "drawn again each time"


def test_an_error_on_one_rank_is_everyone_s(tmp_path):
    code = "def reward(response, answer):\n    return 1 / (response != '2b')\n"
    answers = run_ranks(4, score_on_a_rank, reward_file(tmp_path, code), 2)
    texts = {result for _, result in answers}
    assert len(texts) == 1, "the same words on every rank"
    assert "response '2b', answer '7': ZeroDivisionError" in texts.pop()


def test_a_number_that_is_not_finite_is_named_on_every_rank(tmp_path):
    code = "def reward(response, answer):\n    return float('inf') if response == '0b' else 1.0\n"
    for _, text in run_ranks(2, score_on_a_rank, reward_file(tmp_path, code), 1):
        assert "mine.py:reward returned inf for prompt '0', response '0b', answer '7': return a finite" in text


@pytest.mark.parametrize("prompts", [1, 3, 4, 64])
@pytest.mark.parametrize("dp", [1, 2, 3, 8])
def test_shares_are_whole_groups_that_follow_each_other(prompts, dp):
    shares = [Share(dp, rank).samples(prompts, group=3) for rank in range(dp)]
    assert [index for share in shares for index in range(3 * prompts)[share]] == list(range(3 * prompts))
    sizes = [len(range(3 * prompts)[share]) for share in shares]
    assert all(size % 3 == 0 for size in sizes) and max(sizes) - min(sizes) <= 3
    assert Share(dp, 0, tp_rank=1).samples(prompts, 3) == slice(0, 0)


def test_a_rank_s_share_follows_from_its_place():
    assert Share.of(SimpleNamespace(dp=4, dp_rank=3, tp_rank=1, tp=2)) == Share(dp=4, dp_rank=3, tp_rank=1)
    assert Share() == Share(dp=1, dp_rank=0, tp_rank=0)


def test_one_rank_scores_everything_without_processes(tmp_path):
    Path(tmp_path / "mine.py").write_text("def reward(response, answer):\n    return None if 'a' in response else 2\n")
    scorer = Scorer(RewardConfig(kind="function", function=f"{tmp_path / 'mine.py'}:reward"))
    assert scorer(ITEMS, GROUP) == [None, Score(2.0)] * 3


def test_one_rank_raises_the_error_of_its_reward(tmp_path):
    config = reward_file(tmp_path, "def reward(response, answer):\n    return 1 / (response != '2b')\n")
    with pytest.raises(RewardError, match="response '2b', answer '7': ZeroDivisionError") as caught:
        Scorer(config)(ITEMS, GROUP)
    assert isinstance(caught.value.__cause__, RewardError)


def test_skipped_samples_are_nan_among_float32():
    values = as_tensor([Score(1.0), None, Score(0.1)])
    assert values.dtype == torch.float32 and values[1].isnan()
    assert torch.equal(values[[0, 2]], torch.tensor([1.0, 0.1]))
