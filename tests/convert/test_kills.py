"""A conversion that is killed: its output is complete or absent, its source unchanged, and the next one works."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import pytest
import torch

from respec_trainer.convert.command import main
from respec_trainer.drafter.format import save_drafter
from respec_trainer.weights.safetensors_io import file_digest
from tests.support.conversions import partials, start
from tests.support.drafters import target_config, tiny_drafter
from tests.support.models import save_tiny_model
from tests.support.saved_models import random_state, save_checkpoint

KILLS = 4  # for each command
WIDER = {"vocab_size": 16_000, "hidden_size": 256}  # 35 MB of weights in float32: long enough to be killed in time
COMMANDS = {
    "to-megatron": ("--hf", "hf", "--tp", "2"),
    "to-hf": ("--checkpoint", "step_40", "--dtype", "fp32", "--shard-gb", "0.01"),
    "reshard": ("--checkpoint", "step_40", "--tp", "4"),
    "drafter": ("--checkpoint", "step_40", "--dtype", "fp32"),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """Make a folder with hf and step_40, whose drafter can draft every token."""
    root = tmp_path_factory.mktemp("kills")
    target = target_config("qwen3", **WIDER)
    save_tiny_model(root / "hf", target, shards=3)
    ids = torch.arange(target.vocab_size)
    save_drafter(tiny_drafter(target, draft_vocab_size=len(ids)), ids, root / "step_40/drafter", torch.float32)
    save_checkpoint(root / "step_40", root / "hf", target, random_state(target), dp=2, dtype="fp32")
    return root


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): file_digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def seconds_of_writing(words: list[str], out: Path) -> float:
    process = start(words, out)
    began = time.monotonic()
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - began


# One command represents all: they write with the same code, and the others take longer.
EVERY = [pytest.param(name, marks=[] if name == "to-megatron" else pytest.mark.long) for name in COMMANDS]


@pytest.mark.parametrize("command", EVERY)
def test_killed_at_any_instant(command, sources, tmp_path, capfd):
    out, before = tmp_path / "out", contents(sources)
    words = [str(sources / part) if part in ("hf", "step_40") else part for part in COMMANDS[command]]
    words = [command, *words, "--out", str(out)]
    span = seconds_of_writing(words, out)
    expected = contents(out)
    shutil.rmtree(out)
    draw, halves = random.Random(command), 0
    for _ in range(KILLS):
        process = start(words, out)
        time.sleep(draw.uniform(0, span))
        process.kill()
        process.join()
        halves += bool(partials(out)) and not out.exists()
        assert contents(sources) == before
        if out.exists():
            assert contents(out) == expected
            shutil.rmtree(out)
        assert main(words) == 0, capfd.readouterr().err
        assert contents(out) == expected
        assert [path.name for path in tmp_path.iterdir()] == ["out"], "what the killed one left is gone"
        shutil.rmtree(out)
    assert halves, "none was hit while it wrote"
