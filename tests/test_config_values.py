"""config.py: every default is the one in docs/configuration.md, and bounds lie where the keys' meanings put them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from respec_trainer.config import Config
from respec_trainer.config_file import valid_keys
from respec_trainer.errors import ConfigError
from tests.support.configs import smallest_config

DOCUMENT = Path(__file__).parents[1] / "docs/configuration.md"


def documented_defaults() -> dict[str, str]:
    """Return the text of each key's default in the tables; "" for none."""
    found = {}
    for line in DOCUMENT.read_text().splitlines():
        if row := re.match(r"\| (`[a-z_]+\.[^|]*`) \| ([^|]*)\|", line):
            keys, defaults = re.findall("`(.+?)`", row[1]), re.findall("`(.+?)`", row[2])
            found |= dict(zip(keys, defaults or [""] * len(keys), strict=True))
    return found


def default_of(key: str) -> Any:
    """Return the default in the schema; None if there is none."""
    section: type[BaseModel] = Config
    *sections, name = key.split(".")
    for part in sections:
        section = section.model_fields[part].annotation
    field = section.model_fields[name]
    return None if field.is_required() else field.default


def as_value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return yaml.safe_load(text)


@pytest.mark.parametrize("key", sorted(set(valid_keys()) - {key.rpartition(".")[0] for key in valid_keys()}))
def test_a_default_is_as_documented(key):
    text, default = documented_defaults()[key], default_of(key)
    if key == "rollout.engine.span":
        assert (text, default) == ("tp", None)  # that of another key
    elif isinstance(default, str) or not text:
        assert text == (default or "")
    else:
        assert as_value(text) == default and isinstance(default, bool) == (text in ("true", "false"))


APART = ["rollout.placement=disaggregated"]
ADAPTS = ["speculation.policy=adaptive", "speculation.profile=p.json"]
# key: values that it may have, values that it may not have, other keys that are needed. Counts of what a run must have
# begin at 1, counts that may be none at 0; sizes and rates are above 0; shares lie from 0 to 1.
BOUNDS = {
    "run.name": (["a", "A1", "0.b_c-d"], ["''", "'.a'", "-a", "_a", "a/b", "'a b'"], []),
    "run.steps": ([1], [0, -1, 1.0], []),
    "run.seed": ([0], [-1], []),
    "run.max_bad_steps": ([1], [0], []),
    "run.lost_after": ([1.0, 600.0], [0.99, 600.1, ".nan"], []),
    "run.hang_timeout": ([601.0], [0.0, -1.0, ".inf", ".nan"], []),
    "data.prompts_per_step": ([1], [0], []),
    "data.max_prompt_tokens": ([1], [0], []),
    "rollout.samples_per_prompt": ([2], [1], []),
    "rollout.engine_ranks": ([1, 2], [0, -1], APART),
    "rollout.audit_every": ([0, 1], [-1], []),
    "rollout.sampling.temperature": ([0.001, 2.0], [0.0, -0.1, ".inf", ".nan"], []),
    "rollout.sampling.top_p": ([0.001, 1.0], [0.0, 1.001], []),
    "rollout.sampling.top_k": ([-1, 2], [-2, 0, 1], []),
    "rollout.sampling.max_new_tokens": ([1], [0], []),
    "rollout.engine.tp": ([1], [0], []),
    "rollout.engine.span": ([1, "null"], [0], []),
    "rollout.engine.max_running_requests": ([1], [0], []),
    "rollout.engine.min_free_slots": ([1, 64], [0, 65], []),
    "rollout.engine.max_total_tokens": ([1, "null"], [0], []),
    "rollout.engine.mem_fraction": ([0.01, 0.99], [0.0, 1.0], []),
    "rollout.engine.threads": ([1], [0], []),
    "rollout.engine.timeout": ([0.1], [0.0, ".inf"], []),
    "rollout.engine.max_restarts": ([0], [-1], []),
    "speculation.topk": ([1], [0], []),
    "speculation.explore": ([0.0, 0.1], [-0.01, 0.11], ADAPTS),
    "speculation.candidates": (["[0, 1]", "[3]", "[0, 3]"], ["[]", "[0]", "[1, 0]", "[1, 1]", "[0, 4]"], ADAPTS),
    "drafter.interval": ([1], [0], []),
    "drafter.delta": ([0.01], [0.0], []),
    "drafter.unroll": ([1], [0], []),
    "drafter.decay": ([0.01, 1.0], [0.0, 1.01], []),
    "drafter.batch_size": ([32], [0], []),
    "drafter.micro_batch_size": ([1], [0], []),
    "drafter.lr": ([1e-9], [0.0, ".inf"], []),
    "drafter.matrix_lr": ([1e-9, "null"], [0.0], []),
    "drafter.weight_decay": ([0.0], [-0.1, ".nan"], []),
    "drafter.clip": ([0.1], [0.0], []),
    "drafter.warmup_updates": ([0], [-1], []),
    "drafter.memory_mb": ([1], [0], []),
    "drafter.max_bad_updates": ([1], [0], []),
    "actor.parallel.tp": ([1], [0], []),
    "actor.zero.stage": ([1, 2, 3], [0, 4], []),
    "actor.optim.lr": ([1e-9], [0.0, -1.0, ".inf"], []),
    "actor.optim.betas": (["[0.0, 0.99]"], ["[-0.1, 0.9]", "[0.9, 1.0]", "[0.9]", "[0.9, 0.9, 0.9]"], []),
    "actor.optim.eps": ([1e-12], [0.0], []),
    "actor.optim.weight_decay": ([0.0], [-0.1], []),
    "actor.optim.clip": ([0.1], [0.0], []),
    "actor.optim.warmup_steps": ([0], [-1], []),
    "actor.optim.min_lr_ratio": ([0.0, 1.0], [-0.1, 1.1], []),
    "actor.micro_batch_size": ([1], [0], []),
    "actor.logprob_chunk": ([1], [0], []),
    "objective.clip_low": ([0.01], [0.0], []),
    "objective.clip_high": ([0.01], [0.0], []),
    "objective.minibatches": ([1, 8], [0, 3, 16], []),
    "objective.tis_clip": ([0.01], [0.0], []),
    "objective.mask_low": ([0.01, 0.99], [0.0, 1.0], []),
    "objective.mask_high": ([1.01, 9.0], [1.0, ".inf"], []),
    "resync.bucket_mb": ([1, 512], [0, 513], []),
    "resync.port": ([1024, 65535, "null"], [1023, 65536], []),
    "resync.timeout": ([0.1], [0.0], []),
    "resync.canary_tokens": ([1], [0], []),
    "resync.canary_tolerance": ([0.001, "null"], [0.0], []),
    "resync.accept_alarm": ([0.0, 1.0], [-0.1, 1.1], []),
    "checkpoint.every": ([0], [-1], []),
    "checkpoint.keep": ([1], [0], []),
    "checkpoint.keep_best": ([0], [-1], []),
    "telemetry.samples_per_step": ([0], [-1], []),
    "telemetry.traces": ([0], [-1], []),
}


@pytest.mark.parametrize("key", BOUNDS)
def test_a_bound_lies_where_the_meaning_puts_it(tmp_path, key):
    accepted, refused, others = BOUNDS[key]
    needed = [*others, *(["rollout.engine_ranks=1"] if others == APART and "ranks" not in key else [])]
    eagle = ["speculation.algorithm=eagle3", "drafter.path=d"] if others == ADAPTS else []
    for value in accepted:
        assert smallest_config(tmp_path, *eagle, *needed, f"{key}={value}")
    for value in refused:
        with pytest.raises(ConfigError, match=re.escape(key.rpartition(".")[2])):
            smallest_config(tmp_path, *eagle, *needed, f"{key}={value}")


def test_values_never_change_after_loading(tmp_path):
    config = smallest_config(tmp_path)
    with pytest.raises(ValueError, match="frozen"):
        config.run.steps = 9
