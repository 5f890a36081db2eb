"""drafter/online/learner.py and setup.py: the drafter's interface to the loop and to resync."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from respec_trainer.drafter.format import save_drafter
from respec_trainer.drafter.online.learner import FrozenDrafter
from respec_trainer.drafter.online.setup import setup_learner
from respec_trainer.errors import ConfigError
from respec_trainer.rollout.sglang.weights import FIXED_IN_DRAFTER, weight_shapes
from tests.support.drafters import DRAFT_IDS, target_config, tiny_drafter
from tests.support.models import tiny_run_config


@pytest.fixture
def folder(tmp_path):
    save_drafter(tiny_drafter(), DRAFT_IDS, tmp_path / "drafter")
    return tmp_path / "drafter"


def config_for(folder):
    return tiny_run_config("actor", {"speculation.algorithm": "eagle3", "drafter.path": str(folder)})


def test_a_frozen_drafter_pushes_its_file_and_stays_as_it_is(folder):
    learner = setup_learner(config_for(folder), target_config())
    assert isinstance(learner, FrozenDrafter)
    before, version = dict(learner.named_tensors()), learner.version
    saved = load_file(folder / "model.safetensors")
    assert set(before) == set(saved) - {"d2t", "t2d"}
    assert all(torch.equal(tensor, saved[name]) for name, tensor in before.items())
    learner.update(lambda: True)
    learner.observe([], None, torch.zeros(0, 2), 1.0)
    assert learner.version == version
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.named_tensors())


def test_a_frozen_drafter_is_copied_as_its_folder(folder, tmp_path):
    learner = setup_learner(config_for(folder), target_config())
    assert not learner.stateful and learner.wants is None and learner.metrics() == {}
    learner.copy_drafter()(tmp_path / "copy")
    copies = {path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir()}
    assert copies == {path.name: path.read_bytes() for path in folder.iterdir()} and "model.safetensors" in copies


def test_it_pushes_every_tensor_that_the_engine_takes_and_no_other(folder):
    learner = setup_learner(config_for(folder), target_config())
    assert {name for name, _ in learner.named_tensors()} == set(weight_shapes(str(folder))) - set(FIXED_IN_DRAFTER)


def test_a_drafter_of_another_target_is_refused(folder):
    with pytest.raises(ConfigError, match="vocab_size"):
        setup_learner(config_for(folder), target_config(vocab_size=200))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"speculation.algorithm": "standalone", "drafter.path": "small"},
        {"speculation.algorithm": "ngram"},
    ],
)
def test_without_a_drafter_of_our_own_there_is_nothing_to_push(changes):
    learner = setup_learner(tiny_run_config("actor", changes), target_config())
    learner.update(lambda: True)
    learner.observe([], None, torch.zeros(0, 2), 1.0)
    assert learner.version == "none" and list(learner.named_tensors()) == []
    assert not learner.stateful and learner.wants is None and learner.metrics() == {}
    with pytest.raises(NotImplementedError, match="no drafter to copy"):
        learner.copy_drafter()
