"""The smallest configuration that loads, for tests to override."""

from __future__ import annotations

from pathlib import Path

from respec_trainer.config import Config
from respec_trainer.config_file import load_config

SMALLEST = """
run: {name: tiny, steps: 2, device: cpu}
model: {path: actor}
data: {path: train.jsonl, prompts_per_step: 4}
rollout: {samples_per_prompt: 2, sampling: {max_new_tokens: 8}}
speculation: {algorithm: none}
"""


def smallest_config(folder: Path, *overrides: str) -> Config:
    """Load SMALLEST with overrides from a file in `folder`, as for a user."""
    path = folder / "smallest.yaml"
    path.write_text(SMALLEST)
    return load_config(path, overrides)
