"""tools/profile_speculation.py on a live engine: a profile that can be fitted, used by a run, and identifies it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import AutoConfig

from respec_trainer.config_file import load_config
from respec_trainer.speculation.profiling.profile import load_profile
from respec_trainer.speculation.profiling.settings import depth_settings
from respec_trainer.speculation.scheduler import DepthScheduler
from respec_trainer.speculation.shape import OFF, Shape, chain
from tests.support.processes.ranks import run_ranks
from tests.support.rollout_models import VOCAB, save_drafter, save_target

REPOSITORY = Path(__file__).parents[3]

CONFIG = """
run: {{name: tiny, steps: 1, device: cpu}}
model: {{path: {folder}/target, dtype: fp32}}
data: {{path: none.jsonl, prompts_per_step: 2, max_prompt_tokens: 64}}
rollout: {{samples_per_prompt: 2, sampling: {{max_new_tokens: 96}}, engine: {{max_running_requests: 4}}}}
speculation: {{steps: 2, draft_tokens: 3}}
drafter: {{path: {folder}/drafter}}
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Run the tool with two engines: one for the chains and one for a tree."""
    folder = tmp_path_factory.mktemp("profile")
    save_target(folder / "target", "qwen3")
    save_drafter(folder / "drafter", folder / "target", torch.arange(VOCAB))
    (folder / "config.yaml").write_text(CONFIG.format(folder=folder))
    return folder, tool(folder, "--steps", "1", "2", "--trees", "2,2,4")


def tool(folder: Path, *more: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/profile_speculation.py", "--quick", "--config", folder / "config.yaml"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [*command, "--out", folder / "profile.json", *more],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )


def test_the_tool_measures_and_reports(measured):
    folder, done = measured
    assert done.returncode == 0, done.stderr
    profile = load_profile(folder / "profile.json")
    assert profile.shapes() == [chain(1), chain(2), Shape(2, 2, 4)]
    plain = [cell for cell in profile.cells if cell.shape == OFF and cell.decodes]
    assert {cell.batch for cell in plain} == {1, 2, 4} and len(plain) == 6
    # About 20 random batches have every number of steps at every place, and each kind of plain step at some place.
    assert all({"plain", "switch"} <= set(cell.times) for cell in plain)
    assert {"extend", "resume"} <= set.union(*(set(cell.times) for cell in plain))
    prompts = [cell for cell in profile.cells if not cell.decodes]
    assert len(prompts) == 6 and all(set(cell.times) == {"prefill", "catch_up"} for cell in prompts)
    assert "held-out error" in done.stdout and "2,1,3" in done.stdout
    assert (folder / "profile.png").stat().st_size > 1000
    table = json.loads((folder / "profile.sglang.json").read_text())
    assert table and all(slot["candidate_steps"][0] in (0, 1, 2) for slot in table.values())
    assert not list(folder.glob(".*.partial"))


def test_a_run_is_served_by_it(measured):
    folder, _ = measured
    overrides = ["speculation.policy=adaptive", f"speculation.profile={folder / 'profile.json'}"]
    config, model = load_config(folder / "config.yaml", overrides), AutoConfig.from_pretrained(folder / "target")
    found = depth_settings(config, model, "cpu")
    assert found.candidates == (0, 1, 2) and {"plain", "catch_up", "switch"} <= set(found.costs)
    assert DepthScheduler.of(found).choose(2, 50.0, 0.0) in found.candidates


def refusal(folder: Path, *more: str) -> tuple[int, str]:
    """Return the tool's exit status and its error, run in this process, which has done the imports."""
    command = ["profile_speculation.py", "--quick", "--config", str(folder / "config.yaml")]
    words, said = [*command, "--out", str(folder / "other.json"), *more], io.StringIO()
    with mock.patch.object(sys, "argv", words), contextlib.redirect_stderr(said), pytest.raises(SystemExit) as ended:
        runpy.run_path(str(REPOSITORY / "tools/profile_speculation.py"), run_name="__main__")
    return ended.value.code, said.getvalue()


def test_what_cannot_be_measured_is_refused(measured):
    folder, _ = measured
    for words, more in (
        ("3,2,99: .* drafts only", ["--trees", "3,2,99"]),
        ("speculation.topk=1, not eagle3 and 2", ["speculation.topk=2", "speculation.draft_tokens=6"]),
        ("leave no room to measure in", ["--steps", "1", "2", "3", "4", "5", "6", "7"]),
    ):
        ((status, said),) = run_ranks(1, refusal, folder, *more)
        assert status == 2 and re.search(words, said), said
