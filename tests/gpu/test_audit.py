"""tools/audit_rollout.py on this machine: the engine draws from the actor's distribution, also after resync and sleep.

A small audit, of some thousand draws in each cell. By default the tool draws until an error of 0.02 would be detected.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.gpu.place import DEVICE, FLOAT32, ON_GPU, REPOSITORY, search_path

# The cells of the chain: plain, two filters, after a resync, after a sleep. A rehearsal has time for one cell.
CELLS, COUNT = ("EAGLE-3 chain, T=1.0", 5) if ON_GPU else ("EAGLE-3 chain, T=1.0, after sleep", 1)
DRAWS, LIMIT = ("3072", "12288") if ON_GPU else ("768", "768")
CONFIG = """
run: {{name: audit, steps: 1, device: {device}}}
model: {{path: {target}}}
data: {{path: {folder}/prompts.jsonl, prompts_per_step: 2, max_prompt_tokens: 64}}
rollout:
  samples_per_prompt: 2
  sampling: {{max_new_tokens: 32}}
  engine: {{mem_fraction: 0.3, max_total_tokens: 32768}}
speculation: {{steps: 3, draft_tokens: 4}}
drafter: {{path: {drafter}}}
"""


def test_the_engine_draws_from_the_actors_distribution(small, tmp_path, record):
    rows = [{"question": text, "answer": "#### 1"} for text in ("How many?", "What is 3 + 4?", "Why so?")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = {"device": DEVICE, "target": small.target, "drafter": small.drafter, "folder": tmp_path}
    (tmp_path / "config.yaml").write_text(CONFIG.format(**names))
    out = tmp_path / "audit.json"
    command = [sys.executable, "tools/audit_rollout.py", "--config", tmp_path / "config.yaml", "--cells", CELLS]
    command += ["--total-variation", "0.1" if ON_GPU else "0.3", "--draws", DRAWS, "--limit", LIMIT, "--json", out]
    environment = os.environ | FLOAT32 | {"DS_ACCELERATOR": DEVICE, "PYTHONPATH": search_path()}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=240)
    assert out.is_file(), done.stdout + done.stderr
    outcome = json.loads(out.read_text())
    tests = ("p_tree", "p_classes", "p_surprisal")
    record(p_values={cell["cell"]: [cell[test] for test in tests] for cell in outcome["cells"]})
    record(power={cell["cell"]: cell["power"] for cell in outcome["cells"]})
    assert len(outcome["cells"]) == COUNT
    assert done.returncode == 0 and outcome["passed"], done.stdout + done.stderr
