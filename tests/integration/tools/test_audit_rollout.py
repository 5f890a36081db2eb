"""tools/audit_rollout.py as users start it: a tiny target with an uneven distribution, a good drafter."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.support.models import tiny_tokenizer
from tests.support.rollout_models import VOCAB, save_drafter, save_target
from tests.support.tiny_runs import REPOSITORY, save_prompts


@pytest.mark.long
def test_its_short_form_passes_a_right_engine(tmp_path):
    """Without speculation, with it, and after a resync."""
    target = save_target(tmp_path / "target", "qwen2")
    tiny_tokenizer(VOCAB).save_pretrained(target)
    drafter = save_drafter(tmp_path / "drafter", target, torch.arange(128))  # drafters know a multiple of 64
    command = [sys.executable, "tools/audit_rollout.py", "--config", "configs/quickstart.yaml", "--short"]
    command += ["--total-variation", "0.15", "--draws", "1024", "--limit", "1024", "--json", str(tmp_path / "out.json")]
    command += [f"model.path={target}", f"drafter.path={drafter}", "run.device=cpu", "data.template='{prompt}'"]
    command += [f"data.path={save_prompts(tmp_path)}"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "PASS" in done.stdout, done.stdout + done.stderr
    outcome = json.loads((tmp_path / "out.json").read_text())
    assert outcome["passed"] and len(outcome["cells"]) == 3
    assert all(cell["power"] >= 0.99 and cell["tokens"] > 1000 for cell in outcome["cells"])
    assert outcome["cells"][1]["accept_length"] > 1.3, "without accepted drafts there is nothing to test"
