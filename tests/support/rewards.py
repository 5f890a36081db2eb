"""Items to score, and rewards in files."""

from __future__ import annotations

from pathlib import Path

from respec_trainer.config import RewardConfig
from respec_trainer.rewards.contract import RewardItem


def item(response: str = "", answer: str = "7", **changes) -> RewardItem:
    known = {"prompt": "How many?", "response_ids": tuple(range(len(response))), "truncated": False, "row": {}}
    return RewardItem(response=response, answer=answer, **known | changes)


def reward_file(folder: Path, code: str, name: str = "reward") -> RewardConfig:
    """Write `code` to a file in `folder`, and return the configuration of its function `name`."""
    path = folder / "mine.py"
    path.write_text(code)
    return RewardConfig(kind="function", function=f"{path}:{name}")
