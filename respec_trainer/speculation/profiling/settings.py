"""Make the DepthSettings of an adaptive run's engines from its configuration and its profile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from respec_trainer.config import Config
from respec_trainer.errors import ConfigError
from respec_trainer.rollout.decode_log import DepthSettings
from respec_trainer.speculation.algorithms import changes_depth, names_of
from respec_trainer.speculation.cost import CostModel
from respec_trainer.speculation.profiling.fit import fit_costs
from respec_trainer.speculation.profiling.machine import identity_of
from respec_trainer.speculation.profiling.profile import Profile, load_profile

# Acceptance at every depth before the first rollout: between a poor drafter's and a good one's.
NEUTRAL = 0.7


def depth_settings(config: Config, hf_config: Any, device: str) -> DepthSettings | None:
    """Return the engines' settings; None with `speculation.policy=fixed`.

    Args:
        hf_config: the actor's, as transformers loads it.
        device: "cpu" or "cuda".

    Raises ConfigError if the profile is missing, malformed or too small to be fitted, if its shapes, versions or
    hardware differ from the run's, naming what differs, or if it does not cover the candidates.
    """
    speculation = config.speculation
    if speculation.policy == "fixed":
        return None
    if not Path(speculation.profile).is_file():
        raise ConfigError(
            f"speculation.profile: no file {speculation.profile}; measure one with "
            f"`python tools/profile_speculation.py --config CONFIG --out {speculation.profile}`"
        )
    profile = load_profile(speculation.profile)
    identity = identity_of(config, hf_config.to_dict(), read_drafter_config(config), device)
    profile.check_fits(identity, speculation.profile)
    return adaptive_settings(
        fit_costs(profile),
        _candidates(config, profile),
        max_batch=config.rollout.engine.max_running_requests,
        max_context=longest_sequence(config, hf_config),
        explore=speculation.explore,
        off=speculation.off,
        seed=config.run.seed,
    )


def adaptive_settings(costs: CostModel, candidates: tuple[int, ...], **more: Any) -> DepthSettings:
    """Return settings of mode "adaptive" with these costs; `more` are other fields of DepthSettings."""
    prior = (NEUTRAL,) * candidates[-1]
    tokens = _tokens_of_a_step(costs)
    learnt = {"costs": costs.to_tuples(), "graph_sizes": costs.graphs, "prior": prior, "catch_up_tokens": tokens}
    return DepthSettings("adaptive", candidates, **learnt, **more)


def _tokens_of_a_step(costs: CostModel) -> int | None:
    """Tokens that the drafter catches up with during the shortest decode step, so that no step takes twice as long.

    A power of two; None if the costs have no times of catching up.
    """
    if not costs.has("catch_up"):
        return None
    tokens = 1
    while tokens < 2**20 and costs.catch_up_seconds(1, 2 * tokens, 2 * tokens) <= costs.step_seconds(1, 1):
        tokens *= 2
    return tokens


def longest_sequence(config: Config, hf_config: Any) -> int:
    """Return the largest number of tokens of prompt and response together."""
    longest = config.data.max_prompt_tokens + config.rollout.sampling.max_new_tokens
    return min(longest, hf_config.max_position_embeddings)


def check_can_adapt(config: Config) -> None:
    """Raise ConfigError unless the run drafts chains: only for these can the engine change the draft steps."""
    speculation = config.speculation
    if not changes_depth(speculation):
        able = names_of("adapts")
        raise ConfigError(
            f"only chains of {able} can change their steps: set speculation.algorithm={able} and "
            f"speculation.topk=1, not {speculation.algorithm} and {speculation.topk}"
        )


def read_drafter_config(config: Config) -> dict[str, Any]:
    """Return the config.json of the drafter in `drafter.path`. Raises ConfigError if there is none."""
    path = Path(config.drafter.path) / "config.json"
    if not path.is_file():
        raise ConfigError(f"drafter.path: {config.drafter.path} holds no config.json")
    return json.loads(path.read_text())


def _candidates(config: Config, profile: Profile) -> tuple[int, ...]:
    speculation = config.speculation
    measured = [shape.steps for shape in profile.shapes() if shape.is_chain]
    found = speculation.candidates
    if found is None:
        found = [0, *(steps for steps in measured if steps <= speculation.steps)]
    # The cost model predicts between measured steps, but not far beyond them.
    if found[-1] > max(measured, default=0) or found[-1] == 0:
        raise ConfigError(
            f"speculation.candidates={found}: {speculation.profile} was measured with chains of {measured} steps; "
            f"choose candidates up to {max(measured, default=0)} (and speculation.steps at least the least of them), "
            "or measure longer chains"
        )
    return tuple(found)
