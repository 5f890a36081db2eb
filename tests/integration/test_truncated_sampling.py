"""Whole runs with top_p and top_k: the policy that is trained is the one that samples, or the metrics show it."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest

from respec_trainer.config_file import load_config
from respec_trainer.telemetry.recorder import read_metrics
from tests.support.processes.ranks import run_ranks
from tests.support.tiny_runs import tiny_run, train

# n-grams, so that tokens come from verification and from draws without drafts.
KEYS = ["rollout.engine.span=2", "actor.parallel.tp=2", "run.steps=2", "speculation.algorithm=ngram"]
KEYS += ["rollout.sampling.max_new_tokens=32", "rollout.sampling.temperature=1.3"]
TRUNCATED = ["rollout.sampling.top_p=0.9", "rollout.sampling.top_k=20"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("truncated")
    _, path, *overrides = tiny_run(folder)

    def run(name: str, *keys: str, function=train) -> list[dict]:
        config = load_config(path, [*overrides, *KEYS, f"run.name={name}", *keys])
        run_ranks(2, function, config, timeout=300)
        return read_metrics(folder / "runs" / name)

    return run


def train_with_log_probs_of_everything(config) -> None:
    """Train with an engine that returns log-probs of the whole vocabulary, as SGLang does by itself."""
    from respec_trainer.rollout.sglang.settings import EngineSettings

    made = EngineSettings.from_config

    def stock(*args, **kwargs):
        return replace(made(*args, **kwargs), truncated_logprobs=False)

    with mock.patch.object(EngineSettings, "from_config", stock):
        train(config)


def test_log_probs_of_sampler_and_actor_agree_after_truncation(run):
    for step in run("right", *TRUNCATED, "rollout.audit_every=1"):
        assert step["mismatch/kl"] < 1e-9  # rounding in float32: ratios are off by some 1e-6
        assert step["rollout/untruncated"] == 0 and step["audit/p_value"] > 1e-3
        assert step["spec/accept_length"] > 1


def test_log_probs_of_the_whole_vocabulary_are_seen(run):
    for step in run("wrong", *TRUNCATED, function=train_with_log_probs_of_everything):
        assert step["mismatch/kl"] > 1e-3


def test_a_run_that_is_allowed_to_ignore_truncation_is_marked(run):
    for step in run("allowed", *TRUNCATED, "rollout.sampling.allow_untruncated=true"):
        assert step["mismatch/kl"] < 1e-9 and step["rollout/untruncated"] == 1
