"""rewards/function.py: a user's function is loaded from its file and called by its signature; errors name it."""

from __future__ import annotations

import pytest

from respec_trainer.config import RewardConfig
from respec_trainer.errors import ConfigError, RewardError
from respec_trainer.rewards.registry import setup_reward
from tests.support.rewards import item, reward_file


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("LIMIT = 4\n\ndef short(text, answer):\n    return float(len(text) < LIMIT)\n")
    return path


def test_a_function_scores(file):
    reward = setup_reward(RewardConfig(kind="function", function=f"{file}:short"))
    assert reward([item("abc"), item("abcd")]) == [1.0, 0.0]


def test_what_cannot_be_loaded_is_named(file, tmp_path):
    broken, ends = tmp_path / "broken.py", tmp_path / "ends.py"
    broken.write_text("1 / 0")
    ends.write_text("raise SystemExit(3)")
    for place, words in (
        (f"{file}:long", "has no function 'long'"),
        (f"{file}:LIMIT", "has no function 'LIMIT'"),
        (f"{tmp_path}/absent.py:f", "no file"),
        ("absent", "path/to/file.py:name"),
        (f"{broken}:f", "ZeroDivisionError"),
        (f"{ends}:f", "SystemExit"),
    ):
        with pytest.raises(ConfigError, match=words):
            setup_reward(RewardConfig(kind="function", function=place))


@pytest.mark.parametrize(
    "signature",
    ["response, answer", "text, reference, scale=1", "*texts", "items, answer", "response, answer, *, strict=False"],
)
def test_a_function_of_two_texts_is_called_for_each_sample(tmp_path, signature):
    body = f"def reward({signature}):\n    first, second = list(locals().values())[:2] if 'texts' not in locals()"
    config = reward_file(tmp_path, f"{body} else texts\n    return first + second == '87'\n")
    assert setup_reward(config)([item("8"), item("9")]) == [True, False]


@pytest.mark.parametrize("signature", ["items", "items, scale=1", "items, *, scale=1", "items, **others"])
def test_a_function_of_items_is_called_with_the_batch(tmp_path, signature):
    config = reward_file(tmp_path, f"def reward({signature}):\n    return [len(items) + i.row['x'] for i in items]\n")
    assert setup_reward(config)([item(row={"x": 1}), item(row={"x": 5})]) == [3, 7]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (
            "def reward(response): return 1",
            r"signature \(response\); define reward\(response, answer\).*reward\(items\)",
        ),
        ("def reward(): return 1", r"signature \(\)"),
        ("def reward(data_source, solution_str, ground_truth, extra_info): return 1", "data_source, solution_str"),
        ("def reward(prompts, *, answers): return 1", r"signature \(prompts, \*, answers\)"),
        ("async def reward(response, answer): return 1", "is async: write it with a plain def"),
        ("class C:\n    async def __call__(self, items): return 1\nreward = C()", "is async"),
        ("reward = getattr", "signature cannot be read"),
    ],
)
def test_other_signatures_are_refused_with_the_two_that_are_right(tmp_path, code, words):
    with pytest.raises(ConfigError, match=words):
        setup_reward(reward_file(tmp_path, code))


@pytest.mark.parametrize("error", ["ValueError('no digits')", "SystemExit(3)"])
def test_an_error_in_it_names_the_sample_and_the_line(tmp_path, error):
    config = reward_file(tmp_path, f"def reward(response, answer):\n    if response == 'b':\n        raise {error}\n")
    with pytest.raises(RewardError) as caught:
        setup_reward(config)([item("a"), item("b", answer="#### 9")])
    for words in ("mine.py:reward failed on", "response 'b', answer '#### 9'", error[:9], "mine.py, line 3", "None to"):
        assert words in str(caught.value)


@pytest.mark.parametrize("settings", [{"kind": "function"}, {"function": "a.py:f"}])
def test_kind_and_function_go_together(settings):
    with pytest.raises(ValueError, match="go together"):
        RewardConfig(**settings)
