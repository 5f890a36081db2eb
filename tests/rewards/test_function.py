"""rewards/function.py: a user's function is loaded from its file, or the reason is named."""

from __future__ import annotations

import pytest

from respec_trainer.config import RewardConfig
from respec_trainer.errors import ConfigError
from respec_trainer.rewards import setup_reward


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("LIMIT = 4\n\ndef short(text, answer):\n    return float(len(text) < LIMIT)\n")
    return path


def test_a_function_scores(file):
    reward = setup_reward(RewardConfig(kind="function", function=f"{file}:short"))
    assert [reward("abc", "7"), reward("abcd", "7")] == [1.0, 0.0]


def test_what_cannot_be_loaded_is_named(file, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0")
    for place, words in (
        (f"{file}:long", "has no function 'long'"),
        (f"{file}:LIMIT", "has no function 'LIMIT'"),
        (f"{tmp_path}/absent.py:f", "no file"),
        ("absent", "path/to/file.py:name"),
        (f"{broken}:f", "ZeroDivisionError"),
    ):
        with pytest.raises(ConfigError, match=words):
            setup_reward(RewardConfig(kind="function", function=place))


@pytest.mark.parametrize("settings", [{"kind": "function"}, {"function": "a.py:f"}])
def test_kind_and_function_go_together(settings):
    with pytest.raises(ValueError, match="go together"):
        RewardConfig(**settings)
