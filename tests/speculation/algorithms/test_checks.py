"""algorithms/checks.py: keys that an algorithm cannot work with are refused when a configuration loads."""

from __future__ import annotations

from dataclasses import replace

import pytest

from respec_trainer.config import SpeculationConfig
from respec_trainer.errors import ConfigError
from respec_trainer.registry import Registry
from respec_trainer.speculation.algorithms import ALGORITHMS, algorithm_of, is_lossy
from respec_trainer.speculation.algorithms.checks import check_speculation
from tests.support.configs import smallest_config

EAGLE3 = ["speculation.algorithm=eagle3", "drafter.path=drafter"]
LOSSY = [*EAGLE3, "speculation.accept_threshold_acc=0.9"]
ADAPTIVE = ["speculation.policy=adaptive", "speculation.profile=p.json"]
LEARNS = "drafter.weighting=reward"


@pytest.mark.parametrize("key", ["accept_threshold_single", "accept_threshold_acc"])
def test_lossy_speculation_must_be_allowed(tmp_path, key):
    shape = [*EAGLE3, f"speculation.{key}=0.5"]
    words = rf"(?s)speculation.{key}=0.5.*no longer follow the policy.*allow_lossy=true"
    with pytest.raises(ConfigError, match=words):
        smallest_config(tmp_path, *shape)
    assert is_lossy(smallest_config(tmp_path, *shape, "speculation.allow_lossy=true").speculation)
    assert not is_lossy(smallest_config(tmp_path, *EAGLE3, "speculation.allow_lossy=true").speculation)
    assert not is_lossy(smallest_config(tmp_path, f"speculation.{key}=0.5").speculation), "without drafts"
    for value in (0, 1.1):
        with pytest.raises(ConfigError, match=f"speculation.{key}"):
            smallest_config(tmp_path, f"speculation.{key}={value}")


@pytest.mark.parametrize("key", ["top_k=5", "top_p=0.9"])
def test_truncation_needs_an_algorithm_that_reports_it_or_a_permission(tmp_path, monkeypatch, key):
    truncated = [f"rollout.sampling.{key}", "speculation.algorithm=ngram"]
    assert not smallest_config(tmp_path, *truncated).rollout.sampling.untruncated
    known = {name: ALGORITHMS[name] for name in ALGORITHMS} | {"ngram": replace(ALGORITHMS["ngram"], truncates=False)}
    monkeypatch.setattr("respec_trainer.speculation.algorithms.ALGORITHMS", Registry("speculation.algorithm", known))
    with pytest.raises(ConfigError, match=rf"(?s){key}.*ngram does not report.*eagle3 or .*allow_untruncated=true"):
        smallest_config(tmp_path, *truncated)
    assert smallest_config(tmp_path, *truncated, "rollout.sampling.allow_untruncated=true").rollout.sampling.untruncated
    allowed = smallest_config(tmp_path, truncated[1], "rollout.sampling.allow_untruncated=true")
    assert not allowed.rollout.sampling.untruncated, "nothing is truncated"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["speculation.algorithm=egle3"],
            r"(?s)smallest.yaml:.*algorithm=egle3: .*did you mean 'eagle3'\? Known: .*none",
        ),
        (["speculation.algorithm=3"], "speculation.algorithm"),
        (EAGLE3[:1], "eagle3 needs drafter.path, a drafter made by tools/train_drafter.py"),
        (["speculation.algorithm=standalone"], "standalone needs drafter.path, the folder of a smaller model"),
        (["speculation.algorithm=ngram", "drafter.path=d"], "ngram has no drafter, but drafter.path=d"),
        (["speculation.algorithm=ngram", "speculation.draft_tokens=1"], "draft_tokens >= 2"),
        ([*EAGLE3, "speculation.draft_tokens=7"], "set draft_tokens=4, not 7"),
        ([*EAGLE3, "speculation.rejection_sampling=true", "speculation.topk=2"], "topk=1, not .* topk=2"),
        (["speculation.algorithm=ngram", "speculation.rejection_sampling=true"], "algorithm=eagle3"),
        ([*LOSSY, "speculation.allow_lossy=true", "speculation.rejection_sampling=true"], "no accept thresholds"),
        ([*EAGLE3, *ADAPTIVE, "speculation.topk=2"], "algorithm=eagle3 with topk=2"),
        ([*ADAPTIVE, "speculation.algorithm=none"], "algorithm=none with topk=1"),
        ([*EAGLE3, LEARNS, "drafter.unroll=2"], "drafter.unroll=3 or more"),
        (["speculation.algorithm=ngram", LEARNS], "none that can be trained.*weighting=none.*algorithm=eagle3"),
    ],
)
def test_what_an_algorithm_cannot_work_with_is_refused(tmp_path, overrides, words):
    with pytest.raises(ConfigError, match=words):
        smallest_config(tmp_path, *overrides)


def test_without_speculation_the_other_keys_do_not_matter(tmp_path):
    unused = ["speculation.draft_tokens=7", "speculation.accept_threshold_acc=0.5", "drafter.path=d"]
    assert smallest_config(tmp_path, *unused, "speculation.rejection_sampling=true").drafter.path == "d"


@pytest.mark.parametrize("algorithm", ["eagle3", "standalone"])
def test_tree_shapes(algorithm):
    def tree(draft_tokens: int) -> SpeculationConfig:
        return SpeculationConfig(algorithm=algorithm, steps=3, topk=2, draft_tokens=draft_tokens)

    for enough in (4, 11):
        check_speculation(tree(enough))
    with pytest.raises(ConfigError, match="3 < draft_tokens <= 11, not 12"):
        check_speculation(tree(12))
    with pytest.raises(ConfigError, match="3 < draft_tokens"):
        check_speculation(tree(3))


@pytest.mark.parametrize(("algorithm", "depth"), [("eagle3", 3), ("standalone", 3), ("ngram", 8)])
def test_the_most_drafts_that_a_pass_accepts(algorithm, depth):
    speculation = SpeculationConfig(algorithm=algorithm, steps=3, draft_tokens=9)
    assert algorithm_of(speculation).depth(speculation) == depth
