"""rollout/plugin_contract.py: both sides of an engine read the same settings and origins."""

from __future__ import annotations

import json

import pytest

from respec_trainer.errors import EngineError
from respec_trainer.rollout.decode_log import DepthSettings
from respec_trainer.rollout.plugin_contract import ORIGINS, plugin_settings, read_origins


def test_origins_are_read_and_counted():
    assert read_origins({ORIGINS: [None, 1, 2]}, 3, "k") == [0, 1, 2]
    assert read_origins({}, 2, "k") == [0, 0]
    with pytest.raises(EngineError, match="request k: 2 origins for 3 tokens"):
        read_origins({ORIGINS: [0, 1]}, 3, "k")


def test_settings_are_json_that_any_process_can_read():
    default = {"device": "cpu", "seeded": True, "steps": None, "truncated_logprobs": True}
    assert json.loads(plugin_settings("cpu", True)) == default
    assert json.loads(plugin_settings("cpu", True, truncated_logprobs=False)) == default | {"truncated_logprobs": False}
    steps = DepthSettings("fixed", (0, 3), max_batch=4, max_context=100, fixed=3)
    settings = json.loads(plugin_settings("cuda", False, steps))
    assert (settings["device"], settings["seeded"]) == ("cuda", False)
    assert DepthSettings.of_json(settings["steps"]) == steps
