from __future__ import annotations

import pytest

from respec_trainer.checkpoint.resume import candidates, check_compatible, restore_logs, run_to_continue
from respec_trainer.config_file import dump_config, valid_keys
from respec_trainer.errors import ConfigError
from tests.support.configs import smallest_config


def test_the_run_to_go_on_with_is_the_newest_of_its_name_that_has_checkpoints(tmp_path):
    config = smallest_config(tmp_path, f"run.dir={tmp_path}", "run.steps=5")
    assert run_to_continue(config) is None
    for name in ("tiny", "tiny-2", "tiny-10", "tiny-x", "tiny-11", "tinier"):
        (tmp_path / name).mkdir()
    for name in ("tiny", "tiny-2", "tiny-10", "tiny-x", "tinier"):
        (tmp_path / name / "checkpoints/step_4").mkdir(parents=True)
    assert run_to_continue(config) == tmp_path / "tiny-10"
    for resume in ("never", str(tmp_path / "tiny")):
        asked = smallest_config(tmp_path, f"run.dir={tmp_path}", "run.steps=5", f"checkpoint.resume={resume}")
        assert run_to_continue(asked) is None
    finished = smallest_config(tmp_path, f"run.dir={tmp_path}", "run.steps=4")
    assert run_to_continue(finished) is None, "nothing is left to be done"


def test_a_path_is_a_run_or_one_of_its_checkpoints(tmp_path):
    root = tmp_path / "old/checkpoints"
    for step in (2, 10):
        (root / f"step_{step}").mkdir(parents=True)
    for path, expected in ((tmp_path / "old", ["step_10", "step_2"]), (root / "step_2", ["step_2"])):
        found = candidates(smallest_config(tmp_path, f"checkpoint.resume={path}"), tmp_path / "new")
        assert [checkpoint.name for checkpoint in found] == expected
    with pytest.raises(ConfigError, match=r"checkpoint\.resume=.*nowhere holds no checkpoint"):
        candidates(smallest_config(tmp_path, f"checkpoint.resume={tmp_path / 'nowhere'}"), tmp_path / "new")


# The keys that decide what is computed: the data, the policy's distribution, the objective, both optimizers. All others
# say where, how fast and how carefully. A new key belongs here unless a run may go on with another value.
DECIDE = """
run: seed
model: dtype
data: prompt_column answer_column template prompts_per_step max_prompt_tokens shuffle
reward: kind marker function
rollout: samples_per_prompt placement engine_ranks deal hand_over
rollout.sampling: temperature top_p top_k allow_untruncated max_new_tokens stop seeded
speculation: algorithm accept_threshold_single accept_threshold_acc allow_lossy
drafter: weighting weight_scope loss mode cadence interval delta unroll decay batch_size lr matrix_lr weight_decay clip
drafter: warmup_updates retention
actor.optim: lr betas eps weight_decay clip warmup_steps schedule min_lr_ratio
objective: kind advantage aggregation clip_low clip_high minibatches correction tis_clip mask_low mask_high
"""


def with_another(section, key: str):
    """Return the section with another value of a dotted key, which need not be valid."""
    name, _, rest = key.partition(".")
    value = with_another(getattr(section, name), rest) if rest else "another value"
    return section.model_copy(update={name: value})


def test_a_run_goes_on_only_with_the_keys_that_decide_what_it_computes(tmp_path):
    config = smallest_config(tmp_path)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    refused = set()
    sections = {key.rpartition(".")[0] for key in valid_keys()}
    for key in set(valid_keys()) - sections:
        try:
            check_compatible(tmp_path, {"optimizer": True, "model": {}}, with_another(config, key), {})
        except ConfigError as error:
            assert f"another configuration: {key} " in str(error) and "-> another value. Set these" in str(error)
            refused.add(key)
    lines = [line.split(": ") for line in DECIDE.strip().splitlines()]
    assert refused == {f"{section}.{key}" for section, keys in lines for key in keys.split()}


def test_every_key_that_differs_is_named_in_one_error(tmp_path):
    config = smallest_config(tmp_path)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    other = smallest_config(tmp_path, "run.seed=3", "actor.optim.lr=0.5", "resync.timeout=7.0")
    with pytest.raises(ConfigError, match=r"configuration: actor\.optim\.lr 1e-06 -> 0\.5; run\.seed 0 -> 3\. Set"):
        check_compatible(tmp_path, {"optimizer": True, "model": {}}, other, {})


def test_a_converted_model_is_not_resumed(tmp_path):
    """It has no moments: to start AdamW anew without a word would be another run."""
    config = smallest_config(tmp_path)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    with pytest.raises(ConfigError, match="holds no optimizer: it is a converted model"):
        check_compatible(tmp_path, {"optimizer": False, "model": {}}, config, {})


SAVED = {"hidden_size": 64, "rope_parameters": {"rope_theta": 1e4}, "dtype": "bfloat16", "use_cache": True}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, None),
        ({"dtype": "float32", "torch_dtype": "float32", "transformers_version": "6", "_name_or_path": "x"}, None),
        ({"use_cache": False, "architectures": ["Other"]}, None),
        ({"hidden_size": 128}, "hidden_size 64 -> 128"),
        ({"rope_parameters": {"rope_theta": 1e6}}, "rope_parameters .* -> .*1000000"),
        ({"sliding_window": 8}, "sliding_window None -> 8"),
        ({"use_cache_of_another_kind": 1}, "use_cache_of_another_kind None -> 1"),  # only begins like one
        ({"dtypes": 1}, "dtypes None -> 1"),
    ],
)
def test_another_model_is_refused_and_another_way_to_write_it_is_not(tmp_path, changes, named):
    config = smallest_config(tmp_path)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    meta = {"optimizer": True, "model": SAVED}
    if named is None:
        check_compatible(tmp_path, meta, config, SAVED | changes)
        return
    with pytest.raises(ConfigError, match=f"another model than model.path=actor: {named}"):
        check_compatible(tmp_path, meta, config, SAVED | changes)


def test_a_checkpoint_of_a_version_with_other_keys_says_so_and_what_to_do(tmp_path):
    config = smallest_config(tmp_path)
    meta = {"optimizer": True, "model": {}}
    (tmp_path / "config.yaml").write_text(dump_config(config))
    check_compatible(tmp_path, meta, config, {})
    (tmp_path / "config.yaml").write_text(dump_config(config) + "unheard: {of: true}\n")
    with pytest.raises(ConfigError, match=r"another version of respec_trainer.*checkpoint\.resume=never.*\n.*unheard"):
        check_compatible(tmp_path, meta, config, {})


def test_logs_end_where_they_did(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    for folder in (run, other):
        folder.mkdir()
    log = run / "metrics.jsonl"
    log.write_text("one\ntwo\nthr")
    with log.open("a") as writer:  # the run's own recorder has it open too
        assert restore_logs(run, run, {"metrics.jsonl": 4, "samples.jsonl": 0}) == []
        writer.write("2\n")
    assert log.read_text() == "one\n2\n"
    assert restore_logs(other, run, {"metrics.jsonl": 4, "samples.jsonl": 9}) == ["samples.jsonl"]
    assert (other / "metrics.jsonl").read_text() == "one\n"
    assert log.read_text() == "one\n2\n"
    with pytest.raises(ConfigError, match="samples.jsonl holds 0 bytes, but held 9"):
        restore_logs(run, run, {"samples.jsonl": 9})


def test_a_log_that_was_empty_is_emptied(tmp_path):
    log = tmp_path / "samples.jsonl"
    log.write_text("a line of a step that is done again\n")
    assert restore_logs(tmp_path, tmp_path, {"samples.jsonl": 0, "absent.jsonl": 0}) == []
    assert log.read_text() == "" and not (tmp_path / "absent.jsonl").exists()
