"""registry.py: names select entries, and the error for a wrong name offers the nearest one."""

from __future__ import annotations

import pytest

from respec_trainer.errors import ConfigError
from respec_trainer.registry import Registry


def test_entries_come_back_by_name_and_in_order():
    registry = Registry("objective.kind", {"grpo": 1})
    assert registry.add("rloo", 2) == 2
    assert (list(registry), len(registry), registry["grpo"], registry["rloo"]) == (["grpo", "rloo"], 2, 1, 2)
    assert "rloo" in registry and "ppo" not in registry


def test_an_unknown_name_is_refused_with_key_nearest_name_and_all_names():
    registry = Registry("objective.kind", {"grpo": 1, "rloo": 2})
    with pytest.raises(ConfigError, match=r"objective\.kind=grp0: .*did you mean 'grpo'\? Known: grpo, rloo"):
        registry["grp0"]


def test_the_nearest_name_is_the_one_that_looks_most_like_it():
    registry = Registry("model_type", {"qwen2": 1, "qwen3": 2, "llama": 3})
    nearest = [registry.nearest(name) for name in ("qwen2_moe", "qwen3_5", "mllama", "gemma")]
    assert nearest == ["qwen2", "qwen3", "llama", "llama"]


def test_a_name_is_given_once():
    registry = Registry("objective.kind", {"grpo": 1})
    with pytest.raises(ValueError, match="'grpo' is taken"):
        registry.add("grpo", 3)
    assert registry["grpo"] == 1


def test_entries_that_were_given_stay_as_they_were():
    given = {"grpo": 1}
    Registry("objective.kind", given).add("rloo", 2)
    assert given == {"grpo": 1}
