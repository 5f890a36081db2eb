"""profiling/settings.py and machine.py: a run's profile reaches its engines, or an error names the differing field."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from respec_trainer.errors import ConfigError
from respec_trainer.speculation.profiling.fit import fit_costs
from respec_trainer.speculation.profiling.machine import identity_of, processor
from respec_trainer.speculation.profiling.profile import Profile
from respec_trainer.speculation.profiling.settings import check_can_adapt, depth_settings
from respec_trainer.speculation.scheduler import DepthScheduler
from tests.support.configs import smallest_config
from tests.support.speculation import CPU, profile_of

MODEL = {"hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 131}
DRAFTER = {"hidden_size": 64, "num_hidden_layers": 1, "draft_vocab_size": 131}
HF_CONFIG = SimpleNamespace(to_dict=lambda: MODEL, max_position_embeddings=256)


@pytest.fixture
def config(tmp_path):
    """Return a function that makes configurations with a drafter, and a profile that fits them."""
    (tmp_path / "drafter").mkdir()
    (tmp_path / "drafter/config.json").write_text(json.dumps(DRAFTER))
    drafter = ["speculation.algorithm=eagle3", f"drafter.path={tmp_path / 'drafter'}"]
    path = tmp_path / "profile.json"
    adaptive = ["speculation.policy=adaptive", f"speculation.profile={path}"]

    def make(*overrides: str):
        return smallest_config(tmp_path, *drafter, *adaptive, *overrides)

    identity = identity_of(make(), MODEL, DRAFTER, "cpu")
    Profile(identity=identity, cells=profile_of(CPU, noise=0.02).cells).save(path)
    make.profile = path
    return make


def test_a_fixed_run_needs_none(tmp_path):
    assert depth_settings(smallest_config(tmp_path), HF_CONFIG, "cpu") is None


def test_what_engines_are_given(config):
    found = depth_settings(config("rollout.engine.max_running_requests=16", "speculation.off=warm"), HF_CONFIG, "cpu")
    assert found.mode == "adaptive" and found.candidates == (0, 1, 2, 3)  # of 1, 2, 3, 5 up to speculation.steps
    assert (found.max_batch, found.max_context, found.off, found.explore) == (16, 256, "warm", 0.005)
    assert found.costs == fit_costs(Profile.model_validate_json(config.profile.read_text())).to_tuples()
    assert found.graph_sizes == ()
    profile = Profile.model_validate_json(config.profile.read_text())
    profile.model_copy(update={"graph_sizes": [1, 2, 64]}).save(config.profile)
    assert depth_settings(config(), HF_CONFIG, "cpu").graph_sizes == (1, 2, 64)
    step = CPU.step_seconds(1, 1)
    assert CPU.catch_up_seconds(1, found.catch_up_tokens, found.catch_up_tokens) <= 1.02 * step < 0.1
    assert CPU.catch_up_seconds(1, 2 * found.catch_up_tokens, 2 * found.catch_up_tokens) > 0.98 * step
    assert DepthScheduler.of(found).choose(4, 100.0, 0.0) in found.candidates
    chosen = config("speculation.steps=5", "speculation.draft_tokens=6", "speculation.candidates=[0, 4]")
    assert depth_settings(chosen, HF_CONFIG, "cpu").candidates == (0, 4)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["speculation.profile=absent.json"], "speculation.profile: no file absent.json; measure one"),
        (["model.dtype=fp32"], "dtype: measured with 'bf16', the run has 'fp32'"),
        (["rollout.engine.threads=2"], "threads: measured with 1, the run has 2"),
        (["rollout.engine.tp=2"], "tp: measured with 1, the run has 2"),
        (
            ["speculation.steps=7", "speculation.draft_tokens=8", "speculation.candidates=[0, 7]"],
            r"candidates=\[0, 7\]: .* was measured with chains of \[1, 2, 3, 5\] steps",
        ),
    ],
)
def test_what_does_not_fit_is_refused(config, overrides, words):
    with pytest.raises(ConfigError, match=words):
        depth_settings(config(*overrides), HF_CONFIG, "cpu")


def test_other_models_are_refused(config):
    other = SimpleNamespace(to_dict=lambda: MODEL | {"hidden_size": 128}, max_position_embeddings=256)
    with pytest.raises(ConfigError, match="profile.json does not fit this run.*\n  model: measured with"):
        depth_settings(config(), other, "cpu")


def test_a_profile_of_long_chains_only(config):
    profile = Profile.model_validate_json(config.profile.read_text())
    cells = [cell for cell in profile.cells if cell.shape.steps in (0, 3, 5)]
    Profile(identity=profile.identity, cells=cells).save(config.profile)
    with pytest.raises(ConfigError, match=r"candidates=\[0\]: .* with chains of \[3, 5\] steps"):
        depth_settings(config("speculation.steps=2", "speculation.draft_tokens=3"), HF_CONFIG, "cpu")


def test_a_drafter_without_a_config(config, tmp_path):
    (tmp_path / "drafter/config.json").unlink()
    with pytest.raises(ConfigError, match="drafter.path: .* holds no config.json"):
        depth_settings(config(), HF_CONFIG, "cpu")


def test_only_chains_can_adapt(tmp_path):
    tree = ["speculation.algorithm=eagle3", "drafter.path=d", "speculation.topk=2", "speculation.draft_tokens=6"]
    with pytest.raises(ConfigError, match="speculation.topk=1, not eagle3 and 2"):
        check_can_adapt(smallest_config(tmp_path, *tree))
    check_can_adapt(smallest_config(tmp_path, *tree[:2]))


def test_processors(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    entry = "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: Some CPU\nstepping\t: 1\ncpu MHz\t: 2600\n"
    cpuinfo.write_text(f"{entry}\n{entry.replace('0', '1')}")
    assert processor(cpuinfo) == "Some CPU 25 17 1"
    assert processor(tmp_path / "absent")
