"""rewards/registry.py: kinds are found by name, and a new one is a file and a line."""

from __future__ import annotations

import pytest

from respec_trainer.config import RewardConfig
from respec_trainer.errors import ConfigError
from respec_trainer.registry import Registry
from respec_trainer.rewards import registry
from respec_trainer.rewards.contract import Score
from respec_trainer.rewards.registry import REWARDS, reward_name, setup_reward
from respec_trainer.rewards.scoring import Scorer
from tests.support import brevity
from tests.support.configs import smallest_config
from tests.support.rewards import item


def test_an_unknown_kind_is_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match=r"reward\.kind=exact_anwser: .*did you mean 'exact_answer'\?.*function"):
        setup_reward(RewardConfig(kind="exact_anwser"))


def test_a_reward_is_named_by_the_key_that_chose_it():
    assert reward_name(RewardConfig(kind="exact_answer")) == "reward.kind=exact_answer"
    assert reward_name(RewardConfig(kind="function", function="a.py:f")) == "reward.function=a.py:f"


def test_a_new_reward_takes_one_file_and_one_line(monkeypatch, tmp_path):
    rewards = Registry("reward.kind", {name: REWARDS[name] for name in REWARDS})
    rewards.add("brevity", brevity.setup)  # the line to add to rewards/registry.py
    monkeypatch.setattr(registry, "REWARDS", rewards)
    scorer = Scorer(smallest_config(tmp_path, "reward.kind=brevity").reward)
    items = [item("it is 7"), item("it is 8", row={"words": 7}), item("it is", truncated=True)]
    assert scorer(items, group=3) == [
        Score(10 / 17, {"correct": 1.0, "brief": 10 / 17}),
        Score(0.0, {"correct": 0.0, "brief": 0.5}),
        None,
    ]
