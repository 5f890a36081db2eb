"""A new draft source is one file and its name in the list: tested on a copy of the package with one source more."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import respec_trainer
from tests.support import phrases
from tests.support.configs import SMALLEST

CONFIGS = Path(__file__).parents[3] / "configs"
# Prints the package's results for the new source, from the functions that a run and an audit call.
ASK = """
import json, sys
from respec_trainer.audit.cells import speculation_of
from respec_trainer.audit.prepare import wanted_cells
from respec_trainer.config_file import load_config
from respec_trainer.drafter.online.setup import setup_learner
from respec_trainer.errors import ConfigError
from respec_trainer.plan import GB, Cluster, plan_layout, plan_memory
from respec_trainer.preflight.drafters import check_drafter
from respec_trainer.rollout.sglang.arguments import server_arguments
from respec_trainer.rollout.sglang.settings import EngineSettings
from pathlib import Path
from types import SimpleNamespace

tiny, shipped, model = sys.argv[1:]
source = ["speculation.algorithm=phrases", "speculation.draft_tokens=6"]
config = load_config(tiny, source)

def refusal(*overrides):
    try:
        load_config(tiny, [*source, *overrides])
    except ConfigError as error:
        return str(error)

def parts(name):
    overrides = ["speculation.draft_tokens=6", "drafter.weighting=none", "drafter.path=null"]
    large = load_config(shipped, [*overrides, f"speculation.algorithm={name}"])
    hf_config = SimpleNamespace(**json.loads(Path(model).read_text()))
    (plan,) = plan_memory(large, hf_config, plan_layout(large, Cluster(1, 8, "cuda")), 80 * GB)
    return {part.name: part.how for part in plan.parts}

cells, modes = wanted_cells(config, "phrases", short=False, control=False)
arguments = server_arguments(EngineSettings.from_config(config, "cpu"))
print(json.dumps({
    "refused": [refusal("speculation.topk=2"), refusal("drafter.path=d"), refusal("drafter.weighting=uniform"),
                refusal("speculation.algorithm=phrase"), refusal("rollout.sampling.top_p=0.9")],
    "arguments": {name: value for name, value in arguments.items() if name.startswith("speculative")},
    "preflight": check_drafter(config, None),
    "cells": [cell.name for cell in cells],
    "audited": speculation_of(modes[cells[0].mode], config.speculation).model_dump(),
    "learner": setup_learner(config, None).version,
    "plans": {name: parts(name) for name in ("phrases", "none")},
}))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Return the results for the source in tests/support/phrases.py, after adding the file and its name to a copy."""
    root = tmp_path_factory.mktemp("source")
    shutil.copytree(Path(respec_trainer.__file__).parent, root / "respec_trainer")
    algorithms = root / "respec_trainer/speculation/algorithms"
    shutil.copy(phrases.__file__, algorithms / "phrases.py")
    text = (algorithms / "__init__.py").read_text()
    text = text.replace("import eagle3, ngram, none, standalone", "import eagle3, ngram, none, phrases, standalone")
    (algorithms / "__init__.py").write_text(text.replace("    ngram,\n", "    ngram,\n    phrases,\n"))

    (root / "tiny.yaml").write_text(SMALLEST)
    command = [sys.executable, "-c", ASK, root / "tiny.yaml", CONFIGS / "qwen2.5-7b-1node.yaml"]
    command += [CONFIGS / "models/qwen2.5-7b.json"]
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_its_own_rules_and_everybodys_are_checked_when_a_configuration_loads(answers):
    shape, path, learning, name, truncation = answers["refused"]
    assert "phrases drafts one branch: set speculation.topk=1, not 2" in shape
    assert "phrases has no drafter, but drafter.path=d" in path
    assert "phrases has none that can be trained" in learning
    assert "did you mean 'phrases'?" in name
    assert "phrases does not report log-probs after truncation" in truncation


def test_the_engine_gets_its_arguments_and_those_of_every_algorithm(answers):
    assert answers["arguments"] == {
        "speculative_algorithm": "NGRAM",
        "speculative_num_draft_tokens": 6,
        "speculative_accept_threshold_single": 1.0,
        "speculative_accept_threshold_acc": 1.0,
        "speculative_use_rejection_sampling": False,
        "speculative_ngram_max_bfs_breadth": 1,
        "speculative_ngram_max_trie_depth": 10,
    }


def test_preflight_plan_and_learner_take_it(answers):
    assert answers["preflight"] is None and answers["learner"] == "none"
    with_drafts, without = answers["plans"]["phrases"], answers["plans"]["none"]
    assert set(with_drafts) == set(without), "no drafter takes memory"
    # The shipped configuration runs 64 requests at once; each adds 6 tokens to a pass, or 1 without drafts.
    logits = [int(plan["engine: one pass"].split(" or ")[1].split()[0]) for plan in (with_drafts, without)]
    assert logits[0] == 6 * logits[1] > 0


def test_an_audit_has_a_cell_for_it(answers):
    assert answers["cells"] == ["phrases, T=1.0"]
    shape = answers["audited"]
    assert (shape["algorithm"], shape["topk"], shape["draft_tokens"]) == ("phrases", 1, 9)
