"""export.py: the drafter at the end of a run, trained or not."""

from __future__ import annotations

import functools

import pytest
import torch

from respec_trainer.drafter.format import load_drafter
from respec_trainer.errors import ConfigError
from respec_trainer.export import export_drafter, set_aside
from tests.support import online
from tests.support.drafters import DRAFT_IDS, target_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return online.save_start(tmp_path_factory.mktemp("online"))


@pytest.fixture(scope="module")
def model():
    return online.target_model()


@pytest.fixture
def make(folder):
    return functools.partial(online.make_learner, folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_exported_drafter_is_the_learner_s(make, model, tmp_path, dtype):
    learner = make()
    began = online.weights(learner)
    for step in range(2):
        online.iterate(learner, model, step)
    now = online.weights(learner)
    assert not online.same(began, now)
    export_drafter(learner.copy_drafter(), tmp_path / "drafter", dtype)
    exported, ids = load_drafter(tmp_path / "drafter", target_config(), dtype=None)
    assert torch.equal(ids, DRAFT_IDS)
    assert all(torch.equal(tensor, now[name].to(dtype)) for name, tensor in exported.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["drafter"]


def test_a_drafter_that_does_not_learn_is_exported_too(folder, make, tmp_path):
    export_drafter(make(weighting="none").copy_drafter(), tmp_path / "drafter", torch.bfloat16)
    exported, source = (load_drafter(f, target_config(), None)[0].state_dict() for f in (tmp_path / "drafter", folder))
    assert all(torch.equal(tensor, source[name]) for name, tensor in exported.items())


def test_it_is_complete_or_absent_and_replaces_nothing(make, tmp_path):
    out, learner = tmp_path / "drafter", make()

    def fail(place):
        learner.copy_drafter()(place)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_drafter(fail, out, torch.float32)
    assert not list(tmp_path.iterdir())
    export_drafter(learner.copy_drafter(), out, torch.float32)
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        export_drafter(learner.copy_drafter(), out, torch.float32)
    assert [set_aside(out), set_aside(out)] == [tmp_path / "drafter.earlier-1", None]
    out.mkdir()
    assert set_aside(out).name == "drafter.earlier-2"
