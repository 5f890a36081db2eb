"""Refuse keys that the chosen speculation algorithm cannot work with, when a configuration loads."""

from __future__ import annotations

from respec_trainer.config import Config, DrafterConfig, SamplingConfig, SpeculationConfig
from respec_trainer.errors import ConfigError
from respec_trainer.speculation.algorithms import Algorithm, algorithm_of, changes_depth, is_lossy, names_of


def check_config(config: Config) -> None:
    """Raise ConfigError, naming keys and remedy, unless speculation and drafter fit `speculation.algorithm`."""
    check_speculation(config.speculation)
    algorithm = algorithm_of(config.speculation)
    _check_truncation(algorithm, config.rollout.sampling)
    _check_drafter_path(algorithm, config.drafter.path)
    if config.drafter.weighting != "none":
        _check_learning(algorithm, config.drafter, config.speculation)


def check_speculation(speculation: SpeculationConfig) -> None:
    """Raise ConfigError, naming keys and remedy, unless the algorithm exists and the section's other keys fit it."""
    algorithm = algorithm_of(speculation)
    if is_lossy(speculation) and not speculation.allow_lossy:
        raise ConfigError(_loss(speculation))
    if algorithm.drafts and speculation.rejection_sampling:
        _check_rejection_sampling(algorithm, speculation)
    if speculation.policy != "fixed" and not changes_depth(speculation):
        able = names_of("adapts")
        raise ConfigError(
            f"speculation.policy={speculation.policy} switches chains of {able}, not algorithm={algorithm.name} with "
            f"topk={speculation.topk}: set speculation.algorithm={able} and speculation.topk=1, or "
            "speculation.policy=fixed"
        )
    algorithm.check(speculation)


def _check_truncation(algorithm: Algorithm, sampling: SamplingConfig) -> None:
    if sampling.truncates and not (algorithm.truncates or sampling.allow_untruncated):
        raise ConfigError(
            f"rollout.sampling.top_k={sampling.top_k}, top_p={sampling.top_p}: speculation.algorithm={algorithm.name} "
            "does not report log-probs after truncation, so another policy would be trained than the one that samples; "
            f"set top_k=-1 and top_p=1, or speculation.algorithm={names_of('truncates')}, or allow it with "
            "rollout.sampling.allow_untruncated=true"
        )


def _loss(speculation: SpeculationConfig) -> str:
    keys = ("accept_threshold_single", "accept_threshold_acc")
    key = next(key for key in keys if getattr(speculation, key) < 1)
    return (
        f"speculation.{key}={getattr(speculation, key)} accepts drafts that the policy would not have sampled: "
        f"responses would no longer follow the policy being trained; set speculation.{key}=1.0, or allow it with "
        "speculation.allow_lossy=true"
    )


def _check_rejection_sampling(algorithm: Algorithm, speculation: SpeculationConfig) -> None:
    if not algorithm.samples or speculation.topk > 1:
        raise ConfigError(
            f"speculation.rejection_sampling needs algorithm={names_of('samples')} and topk=1, not "
            f"algorithm={algorithm.name} and topk={speculation.topk}"
        )
    if is_lossy(speculation):
        raise ConfigError(
            "speculation.rejection_sampling has no accept thresholds: set speculation.accept_threshold_single and "
            "speculation.accept_threshold_acc to 1"
        )


def _check_drafter_path(algorithm: Algorithm, path: str | None) -> None:
    if algorithm.folder is not None and path is None:
        raise ConfigError(
            f"speculation.algorithm={algorithm.name} needs drafter.path, {algorithm.folder.value} "
            "(or set speculation.algorithm=none)"
        )
    if algorithm.drafts and algorithm.folder is None and path is not None:
        raise ConfigError(
            f"speculation.algorithm={algorithm.name} has no drafter, but drafter.path={path} is given: leave it out, "
            f"or set speculation.algorithm={names_of('folder')}"
        )


def _check_learning(algorithm: Algorithm, drafter: DrafterConfig, speculation: SpeculationConfig) -> None:
    if not algorithm.learns:
        raise ConfigError(
            f"drafter.weighting={drafter.weighting} trains a drafter, but speculation.algorithm={algorithm.name} has "
            f"none that can be trained: set drafter.weighting=none, or speculation.algorithm={names_of('learns')}"
        )
    if drafter.unroll < speculation.steps:
        raise ConfigError(
            f"drafter.unroll={drafter.unroll} simulates fewer draft steps than the engine drafts "
            f"(speculation.steps={speculation.steps}): set drafter.unroll={speculation.steps} or more"
        )
