"""Estimate a training step: a layout that fits, its memory, its simulated rollout, its traffic and its time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

from benchmarks.scale.hardware import Hardware
from benchmarks.scale.roofline import roofline
from benchmarks.scale.traffic import Layout, Push, Volumes, push, tensor_parallel, update
from respec_trainer.config import Config
from respec_trainer.errors import ConfigError
from respec_trainer.plan import Cluster, MemoryPlan, plan_layout, plan_memory
from respec_trainer.plan.memory import drafter_sizes
from respec_trainer.plan.sizes import model_parameters
from respec_trainer.speculation.cost import CostModel
from respec_trainer.speculation.simulation.replay import policy_named
from respec_trainer.speculation.simulation.simulator import Outcome, Setting, simulate
from respec_trainer.speculation.simulation.trace import Trace

FRACTIONS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)  # rollout.engine.mem_fraction, the largest that fits


@dataclass(frozen=True)
class Fit:
    """A configuration that fits, and the plan of its memory."""

    config: Config
    layout: Layout
    memory: MemoryPlan

    @property
    def slots(self) -> int:
        """Sequences that an engine runs: as many of the longest ones as its cache holds."""
        return max(
            1, min(self.config.rollout.engine.max_running_requests, self.memory.pool_tokens // self.memory.longest)
        )


@dataclass(frozen=True)
class Step:
    """One step's rollouts, traffic and time. Traffic is that of one GPU; `rollouts` are by the policy's name."""

    rollouts: dict[str, Outcome]
    push: Push
    training: Volumes
    computing: float  # seconds of scoring and training, without the traffic

    def seconds(self, policy: str, gpu: Hardware) -> float:
        return self.rollouts[policy].makespan + self.push.seconds(gpu) + self.training_seconds(gpu)

    def training_seconds(self, gpu: Hardware) -> float:
        """Return the seconds of computing plus those of traffic: they do not overlap, because `overlap_comm` is off."""
        return self.computing + self.training.seconds(gpu)


def best_fit(config: Config, hf_config, trace: Trace, gpus: int, gpu: Hardware) -> Fit | None:
    """Return the colocated layout of `gpus` GPUs that fits and has the least `rough_seconds`; None if none fits.

    `config` gives all settings except actor.parallel.tp, actor.zero.stage, actor.micro_batch_size and
    rollout.engine.mem_fraction.
    """
    costs = roofline(hf_config, drafter_sizes(config, hf_config, None), config.rollout.engine.tp, gpu)
    found = list(fits(config, hf_config, gpus, gpu))
    return min(found, key=lambda fit: rough_seconds(fit, hf_config, trace, gpus, gpu, costs), default=None)


def fits(config: Config, hf_config, gpus: int, gpu: Hardware) -> Iterator[Fit]:
    """Yield every layout that fits, each with the largest share of memory for the engine that still fits."""
    engine_tp = config.rollout.engine.tp
    for tp in (tp for tp in (1, 2, 4, 8) if tp >= engine_tp):
        for stage, micro in product((1, 2, 3), (8, 4, 2, 1)):
            fit = _fit(_changed(config, tp, stage, micro), hf_config, gpus, gpu)
            if fit is not None:
                yield fit


def _fit(config: Config, hf_config, gpus: int, gpu: Hardware) -> Fit | None:
    try:
        layout = plan_layout(config, Cluster(gpus // gpu.gpus_per_host, gpu.gpus_per_host, "cuda"))
    except ConfigError:
        return None
    for fraction in FRACTIONS:
        tried = _with_fraction(config, fraction)
        (memory,) = plan_memory(tried, hf_config, layout, gpu.memory)
        if not memory.problems():
            fitting = Layout(layout.tp, layout.dp, config.actor.zero.stage, config.rollout.engine.tp)
            return Fit(tried, fitting, memory)
    return None


def rough_seconds(fit: Fit, hf_config, trace: Trace, gpus: int, gpu: Hardware, costs: CostModel) -> float:
    """Estimate the seconds of a plain rollout that keeps all slots full to its end, and of training's traffic."""
    share = len(trace) * fit.layout.engine_tp / gpus  # samples of each engine
    batch = min(fit.slots, share)
    context = float(trace.prompt.mean() + trace.length.mean() / 2)
    rollout = max(share * trace.length.mean() / batch, trace.length.max()) * costs.step_seconds(batch, context)
    return rollout + _training(fit, hf_config, trace, gpu).seconds(gpu)


def estimate(fit: Fit, hf_config, trace: Trace, gpus: int, gpu: Hardware, candidates: list[int], mfu: float) -> Step:
    """Estimate a step whose engines share the rollout `trace`, without speculation and with adaptive speculation.

    Args:
        mfu: the share of `gpu.flops` that training reaches.
    """
    drafter = drafter_sizes(fit.config, hf_config, None)
    engines = gpus // fit.layout.engine_tp
    costs = roofline(hf_config, drafter, fit.layout.engine_tp, gpu)
    rollouts = {name: slowest(trace, engines, fit.slots, costs, candidates, name) for name in ("off", "adaptive")}
    tokens = float((trace.prompt + trace.length).sum())
    numbers = model_parameters(hf_config)
    # Operations per weight and token: 2 forward, 4 backward, 2 for recomputation, and 2 for scoring.
    computing = tokens * numbers * (2 + 4 + 2 + 2) / (gpus * gpu.flops * mfu)
    carried = push(numbers, drafter.parameters, fit.layout, gpu)
    return Step(rollouts, carried, _training(fit, hf_config, trace, gpu), computing)


def _training(fit: Fit, hf_config, trace: Trace, gpu: Hardware) -> Volumes:
    """The traffic of scoring and of one update on the step's samples."""
    layout, tokens = fit.layout, float((trace.prompt + trace.length).sum()) / fit.layout.dp
    passes = math.ceil(len(trace) / layout.dp / fit.config.actor.micro_batch_size)
    reduced = update(model_parameters(hf_config), layout, gpu, passes, passes)
    return reduced + tensor_parallel(hf_config, layout, tokens, tokens)


def slowest(trace: Trace, engines: int, slots: int, costs: CostModel, candidates: list[int], policy: str) -> Outcome:
    """Simulate the engine that should take longest: the one with most tokens, or one with the longest response.

    Engines do not affect each other, so these two are simulated alone, with the expected number of kept drafts in every
    pass. Another engine, with nearly as many tokens in a worse order, may take a few percent longer.
    """
    owners = np.arange(len(trace)) * engines // len(trace)
    load = np.bincount(owners, trace.length, engines)
    longest = np.array([trace.length[owners == engine].max(initial=0) for engine in range(engines)])
    last = int(np.lexsort((load, longest))[-1])
    outcomes = [
        _alone(_share(trace, owners == engine), slots, costs, candidates, policy)
        for engine in {int(load.argmax()), last}
    ]
    return max(outcomes, key=lambda outcome: outcome.makespan)


def _share(trace: Trace, mine: np.ndarray) -> Trace:
    return Trace(trace.prompt[mine], trace.length[mine], trace.group[mine], trace.acceptance[mine])


def _alone(trace: Trace, slots: int, costs: CostModel, candidates: list[int], policy: str) -> Outcome:
    setting = Setting(slots=slots, sampled=False)
    return simulate(trace, costs, policy_named(policy, costs, candidates, trace, setting), setting)


def _changed(config: Config, tp: int, stage: int, micro: int) -> Config:
    parallel = config.actor.parallel.model_copy(update={"tp": tp})
    zero = config.actor.zero.model_copy(update={"stage": stage})
    changes = {"parallel": parallel, "zero": zero, "micro_batch_size": micro}
    return config.model_copy(update={"actor": config.actor.model_copy(update=changes)})


def _with_fraction(config: Config, fraction: float) -> Config:
    engine = config.rollout.engine.model_copy(update={"mem_fraction": fraction})
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"engine": engine})})
