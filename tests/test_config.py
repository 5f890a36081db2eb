"""config.py: valid files load, others are refused, and each refusal names the key and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from respec_trainer.config import Config, OptimConfig, Section
from respec_trainer.config_file import dump_config, load_config, valid_keys
from respec_trainer.errors import ConfigError
from respec_trainer.placement import check_world

REPOSITORY = Path(__file__).parents[1]

MINIMAL = """
run: {name: tiny, steps: 2}
model: {path: actor}
data: {path: train.jsonl, prompts_per_step: 4}
rollout: {samples_per_prompt: 2, sampling: {max_new_tokens: 8}}
drafter: {path: drafter}
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str = MINIMAL) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_minimal_file_gets_defaults(write):
    config = load_config(write())
    assert config.actor.zero.stage == 1
    assert config.speculation.draft_tokens == config.speculation.steps + 1
    assert config.samples_per_step == 8


def test_overrides_win_and_are_typed(write):
    config = load_config(write(), ["actor.parallel.tp=2", "actor.optim.lr=2e-5", "rollout.sampling.stop=[x, y]"])
    assert config.actor.parallel.tp == 2
    assert config.actor.optim.lr == 2e-5
    assert config.rollout.sampling.stop == ["x", "y"]


def test_dump_reads_back_equal(write, tmp_path):
    config = load_config(write(), ["run.seed=7"])
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("actor.optim.learning_rate", "actor.optim.lr"),
        ("rollout.sampling.temprature", "rollout.sampling.temperature"),
        ("actor.tp", "actor.parallel.tp"),
        ("speculaton.steps", "speculation"),
        ("run.step", "run.steps"),
    ],
)
def test_unknown_key_names_the_nearest_valid_one(write, key, nearest):
    assert f"unknown key; did you mean {nearest}?" in refused(write(), f"{key}=3")


def test_every_bad_key_is_named_at_once(write):
    message = refused(write(), "run.steps=two", "actor.zero.stage=4", "data.promts=3")
    assert "run.steps" in message and "'two'" in message
    assert "actor.zero.stage" in message
    assert "data.promts" in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.steps='2'", "run.steps"),  # a string is not a number
        ("run.steps=0", "run.steps"),
        ("actor.optim.lr=.nan", "actor.optim.lr"),
        ("actor.optim.lr=.inf", "actor.optim.lr"),
        ("data.template=no place", "{prompt}"),
        ("rollout.engine.min_free_slots=65", "max_running_requests=64"),
        ("objective.minibatches=3", "objective.minibatches=3"),
        ("objective.mask_low=0", "objective.mask_low"),
        ("objective.mask_low=1.0", "objective.mask_low"),
        ("objective.mask_high=1.0", "objective.mask_high"),
        ("objective.mask_high=.inf", "objective.mask_high"),
        ("objective.correction=mask", "'sequence_mask'"),
        ("actor.parallel.sequence_parallel=true", "tp >= 2"),
        ("rollout.sampling.temperature=0", "greedy"),
        ("rollout.samples_per_prompt=1", "samples_per_prompt"),
        ("run.name=../escape", "run.name"),
        ("actor.optim.betas=[0.9]", "actor.optim.betas"),
        ("drafter.weighting=return", "'advantage'"),
        ("drafter.memory_mb=0", "drafter.memory_mb"),
        ("drafter.delta=0", "drafter.delta"),
        ("drafter.decay=0", "drafter.decay"),
    ],
)
def test_what_cannot_work_is_refused(write, override, words):
    assert words in refused(write(), override)


@pytest.mark.parametrize("override", ["run.steps", "=3", "run..steps=3", "run.steps.deep=1", "run.name=[a"])
def test_malformed_override(write, override):
    assert repr(override) in refused(write(), override)


def test_malformed_files(write, tmp_path):
    assert "no configuration file" in refused(tmp_path / "absent.yaml")
    assert "not valid YAML" in refused(write("run: [unclosed"))
    assert "sections" in refused(write("- a\n- b\n"))
    assert "given twice" in refused(write(MINIMAL + "\nrun: {name: again, steps: 1}\n"))


@pytest.mark.parametrize(
    ("world", "overrides", "words"),
    [
        (1, ["actor.parallel.tp=2"], "--num_gpus 2"),
        (3, ["rollout.engine.span=2"], "rollout.engine.span=2"),
        (3, [], "multiple of 3"),
    ],
)
def test_world_that_cannot_carry_it(write, world, overrides, words):
    with pytest.raises(ConfigError, match=words):
        check_world(load_config(write(), overrides), world)


def test_shipped_configs_load():
    shipped = [p for p in (REPOSITORY / "configs").glob("*.yaml") if "run" in yaml.safe_load(p.read_text())]
    assert shipped
    for path in shipped:
        assert isinstance(load_config(path), Config)


def test_valid_keys_are_dotted_and_unique():
    keys = valid_keys()
    assert len(keys) == len(set(keys))
    assert {"actor.parallel.tp", "rollout.sampling.temperature", "run.steps"} <= set(keys)


def test_every_key_is_documented():
    documented = (REPOSITORY / "docs/configuration.md").read_text()
    sections = {key.rpartition(".")[0] for key in valid_keys()}
    leaves = [key for key in valid_keys() if key not in sections]
    assert [key for key in leaves if f"`{key}`" not in documented] == []


@pytest.mark.parametrize("key", ["rollout.engine.timeout", "resync.timeout"])
def test_an_engine_s_hang_is_found_before_its_ranks_are_ended(write, key):
    """At equal times either may come first, so the run's must be longer."""
    other = {"rollout.engine.timeout": "resync.timeout", "resync.timeout": "rollout.engine.timeout"}[key]
    times = [f"{other}=1.0", f"{key}=60.0"]
    assert load_config(write(), [*times, "run.hang_timeout=60.5"]).run.hang_timeout == 60.5
    for hang in (60.0, 59.0):
        assert f"{key}=60 can show" in refused(write(), *times, f"run.hang_timeout={hang}")


def test_seeds_and_a_drafter_that_draws_are_refused(write):
    both = ["speculation.rejection_sampling=true", "rollout.sampling.seeded=true"]
    assert "seeded does not seed the draws of the drafter" in refused(write(), *both)


@pytest.mark.parametrize("top_k", [-2, 0, 1])
def test_one_token_to_choose_from_is_refused(write, top_k):
    assert f"top_k={top_k} must be -1 (no limit) or at least 2" in refused(write(), f"rollout.sampling.top_k={top_k}")


def test_sampling_that_truncates(write):
    for overrides, truncates in ([], False), (["top_k=2"], True), (["top_p=0.99"], True), (["top_p=1.0"], False):
        sampling = load_config(write(), [f"rollout.sampling.{each}" for each in overrides]).rollout.sampling
        assert sampling.truncates == truncates and not sampling.allow_untruncated


ADAPTIVE = ["speculation.policy=adaptive", "speculation.profile=p.json"]


def test_steps_that_adapt(write):
    config = load_config(write(), [*ADAPTIVE, "speculation.candidates=[0, 1, 3]"]).speculation
    assert config.candidates == [0, 1, 3] and config.off == "defer" and config.explore == 0.005
    assert load_config(write(), ADAPTIVE).speculation.candidates is None


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (ADAPTIVE[:1], "needs profile: measure one with tools/profile_speculation.py"),
        (ADAPTIVE[1:], "profile and candidates are for policy=adaptive"),
        (["speculation.candidates=[0, 1]"], "profile and candidates are for policy=adaptive"),
        ([*ADAPTIVE, "speculation.candidates=[1, 0]"], r"candidates=\[1, 0\] must rise"),
        ([*ADAPTIVE, "speculation.candidates=[0]"], "not be only 0"),
        ([*ADAPTIVE, "speculation.candidates=[0, 4]"], "set steps=4 and draft_tokens=5"),
        ([*ADAPTIVE, "speculation.explore=0.2"], "speculation.explore"),
    ],
)
def test_steps_that_cannot_adapt(write, overrides, words):
    with pytest.raises(ConfigError, match=words):
        load_config(write(), overrides)


@pytest.mark.parametrize(
    ("text", "value"),
    [("5e-4", 5e-4), ("5.e-4", 5e-4), (".5e-3", 5e-4), ("0.5E-3", 5e-4), ("+5e-4", 5e-4), ("5_0e-5", 5e-4)],
)
def test_numbers_may_be_written_with_an_exponent_in_every_usual_way(write, text, value):
    assert load_config(write(), [f"actor.optim.lr={text}"]).actor.optim.lr == value


@pytest.mark.parametrize("text", ["e5", "1e", "1e-5x", "x1e-5"])
def test_what_only_looks_like_a_number_is_a_text(write, text):
    assert f"(got '{text}')" in refused(write(), f"actor.optim.lr={text}")
    assert load_config(write(), [f"run.dir={text}"]).run.dir == text


def test_keys_that_are_missing_are_named_with_their_sections(write):
    message = refused(write("run: {name: tiny}\nmodel: {path: a}\ndata: {path: b, prompts_per_step: 4}\n"))
    assert message.splitlines()[1:] == ["  run.steps: required, but not given", "  rollout: required, but not given"]


def test_a_key_given_twice_is_named_with_its_line(write):
    message = refused(write("run:\n  name: tiny\n  steps: 1\n  name: other\n"))
    assert "key 'name' is given twice" in message and "line 2" in message


def test_a_value_that_is_wrong_is_shown_and_a_reason_of_several_keys_is_not_repeated(write):
    assert "  run.steps: Input should be a valid integer (got 'two')" in refused(write(), "run.steps=two")
    message = refused(write(), "objective.minibatches=3")
    assert message.splitlines()[1].startswith("  objective.minibatches=3 must divide") and "got" not in message
    assert "  data: template must contain {prompt}, where the prompt column's text goes" in refused(
        write(), "data.template=x"
    )


def test_overrides_make_sections_and_the_last_one_wins(write):
    config = load_config(write(), ["actor.optim.lr=0.5", "actor.optim.lr=0.25", " run.steps =7", "run.dir=a=b"])
    assert (config.actor.optim.lr, config.run.steps, config.run.dir) == (0.25, 7, "a=b")


def test_settings_that_an_algorithm_refuses_name_the_file(write):
    path = write()
    message = refused(path, "drafter.path=null")
    assert message.startswith(f"{path}:\n  ") and "drafter.path" in message


def test_another_kind_of_file_has_its_own_keys(write):
    class Recipe(Section):
        steps: int = 3
        actor: OptimConfig = OptimConfig()

    assert load_config(write("actor: {lr: 1e-3}"), ["steps=4"], kind=Recipe) == Recipe(
        steps=4, actor=OptimConfig(lr=1e-3)
    )
    with pytest.raises(ConfigError, match="unknown key; did you mean actor.lr"):
        load_config(write("actor: {lrr: 1e-3}"), kind=Recipe)
    assert valid_keys(Recipe)[:3] == ["steps", "actor", "actor.lr"]
