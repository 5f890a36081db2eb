"""tests/gpu without a GPU: all tests are found, one line states why they do not run, and results are readable."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu import results

REPOSITORY = Path(__file__).parents[1]
ASKED = (
    *("point_1_captured_features", "point_2_sampled_verification", "point_3_the_drafter_survives", "point_4_selector"),
    *("point_5_what_keeping", "point_6_weights_arrive_by_cuda_ipc", "point_7_zero", "point_8_the_solvers_model"),
    *("point_7_tensor_parallel", "sleep_returns_the_memory", "greedy_tokens_are_transformers", "steps_that_change"),
    *("draws_from_the_actors_distribution", "throughput_by_batch", "bf16_scores"),
)


@pytest.fixture(scope="module")
def skipped(tmp_path_factory) -> tuple[str, dict]:
    """Return pytest's output and the results of the whole suite when CUDA shows no device."""
    out = tmp_path_factory.mktemp("suite") / "results.json"
    hidden = {"CUDA_VISIBLE_DEVICES": "", "RESPEC_GPU_RESULTS": str(out), "RESPEC_GPU_TESTS": "cuda"}
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ | hidden, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(out.read_text())


def test_every_test_that_was_asked_for_is_collected(skipped):
    names = list(skipped[1]["tests"])
    assert not [part for part in ASKED if not any(part in name for name in names)]


def test_one_line_says_why_none_runs(skipped):
    output, data = skipped
    lines = [line for line in output.splitlines() if line.startswith("SKIPPED")]
    assert len(lines) == 1 and re.search(r"\[\d+\] .*torch.cuda.is_available\(\) is false", lines[0]), output
    assert {test["outcome"] for test in data["tests"].values()} == {"skipped"}


def test_results_of_no_gpu_stay_out_of_the_page(skipped, tmp_path, capsys):
    page, source = tmp_path / "gpu.md", tmp_path / "results.json"
    page.write_text("as it is")
    source.write_text(json.dumps(skipped[1]))
    results.main(source, page)
    assert page.read_text() == "as it is" and "no results of a GPU" in capsys.readouterr().out


def test_results_become_a_table_between_the_marks(tmp_path):
    tests = {
        "tests/gpu/test_a.py::test_speed": {"outcome": "passed", "seconds": 3.2, "values": {"point": 6, "gb": 41.25}},
        "tests/gpu/test_a.py::test_law": {"outcome": "failed", "seconds": 1.0, "values": {}, "reason": "p | 0\nhere"},
    }
    data = {"machine": {"device": "H200", "gpus": "1"}, "seconds": 4.2, "tests": tests}
    page, source = tmp_path / "gpu.md", tmp_path / "results.json"
    page.write_text(f"before\n{results.BEGIN}\nold\n{results.END}\nafter\n")
    source.write_text(json.dumps(data))
    results.main(source, page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| test_speed (point 6) | passed | 3 | gb 41.25 |" in text
    assert "| test_law | failed | 1 | p / 0 here |" in text
    with pytest.raises(ValueError, match="no <!-- results -->"):
        results.put("a page without marks", "content")


def test_the_page_has_the_marks():
    assert results.put((REPOSITORY / "docs/gpu.md").read_text(), "x")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_the_drafter_of_the_gpu_models_is_mostly_right(tmp_path):
    """Greedy drafts equal the target's own tokens, by transformers and this package's drafter, without an engine."""
    from respec_trainer.actor.loading import load_hf_config
    from respec_trainer.drafter.format import load_drafter
    from tests.gpu.models import SMALL, prompts, save_pair, shortfall
    from tests.support.rollout_models import Reference

    pair = save_pair(tmp_path, SMALL, "fp32")
    model = Reference(pair.target).model
    drafter, ids = load_drafter(pair.drafter, load_hf_config(pair.target))
    tokens = torch.tensor([prompts(8, SMALL.vocab)[0] * 2])
    with torch.no_grad():
        answer = model(tokens, output_hidden_states=True)
        features = torch.cat([answer.hidden_states[layer + 1] for layer in drafter.shape.feature_layers], -1)
        (hidden,) = drafter.unroll(model.get_input_embeddings()(tokens), features, 1)
    drafts = ids[drafter.logits(hidden)[0, :-2].argmax(-1)]
    best = answer.logits[0, 1:-1].argmax(-1)
    assert (drafts == best).float().mean() > 0.4
    assert shortfall(answer.logits[0, 1:-1], best) == 0 < shortfall(answer.logits[0, 1:-1], best.roll(1))
