"""`launch/train.py --check`: the plan of a run and every problem found, without training."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from respec_trainer.actor.check import check_model
from respec_trainer.config import Config
from respec_trainer.errors import ConfigError
from respec_trainer.plan.learner import learner_problems
from respec_trainer.plan.memory import GB, MemoryPlan, drafter_sizes, plan_memory
from respec_trainer.plan.places import Cluster, Layout, plan_layout
from respec_trainer.plan.show import show
from respec_trainer.preflight.checks import check_shapes, every_problem, read_model_config
from respec_trainer.speculation.algorithms import DrafterFolder, algorithm_of

WIDTH = 150  # columns, where the output goes to a file
GPU_GB = 80.0  # default if this machine has no GPU: an H100's


@dataclass(frozen=True)
class Question:
    """The machine and model to plan for. None: those of the launcher, or of this machine.

    `model_config` is a config.json for planning before model, drafter and data exist; then these are not checked.
    """

    nodes: int | None = None
    gpus_per_node: int | None = None
    gpu_memory_gb: float | None = None
    model_config: str | None = None


def check(config: Config, question: Question, console: Console | None = None) -> int:
    """Print the plan and every problem. Return the exit status: 0 without problems, otherwise 2."""
    problems: list[str] = []
    cluster = attempt(problems, cluster_of, config, question)
    if question.model_config is None:
        problems += [str(error) for error in every_problem(config)]
        hf_config = attempt([], read_model_config, Path(config.model.path))  # every_problem has reported its errors
    else:
        hf_config = attempt(problems, read_model_config, Path(question.model_config), "--model_config")
        if hf_config is not None:
            attempt(problems, check_shapes, config, hf_config)
    layout = attempt(problems, plan_layout, config, cluster) if cluster else None
    memory: list[MemoryPlan] = []
    if layout and hf_config is not None:
        memory = attempt(problems, plans_of, config, question, layout, hf_config) or []
    for plan in memory:
        problems += plan.problems()
    if memory:
        drafter = drafter_sizes(config, hf_config, draft_vocabulary_of(config))
        problems += learner_problems(config, drafter, layout, memory[0].longest)
    console = console or Console(width=None if sys.stdout.isatty() else WIDTH)
    problems = list(dict.fromkeys(problems))
    show(console, config, layout, memory, problems)
    return 2 if problems else 0


def attempt(problems: list[str], action, *arguments):
    """Return the result of `action`; if it raises ConfigError, add the text to `problems` and return None."""
    try:
        return action(*arguments)
    except ConfigError as error:
        problems.append(str(error))
        return None


def cluster_of(config: Config, question: Question) -> Cluster:
    """Return the cluster of the question, or of the launcher if there is one, or of this machine."""
    import torch

    if question.nodes or question.gpus_per_node:
        device = "cpu" if config.run.device == "cpu" else "cuda"
        return Cluster(question.nodes or 1, question.gpus_per_node or max(torch.cuda.device_count(), 1), device)
    device = "cuda" if config.run.device != "cpu" and torch.cuda.is_available() else "cpu"
    started = Cluster.of_launcher(device)
    if started is not None:
        return started
    least = math.lcm(config.actor.parallel.tp, config.rollout.engine.span or config.rollout.engine.tp)
    return Cluster(1, torch.cuda.device_count() if device == "cuda" else least + config.rollout.engine_ranks, device)


def plans_of(config: Config, question: Question, layout: Layout, hf_config) -> list[MemoryPlan]:
    """Return the memory plans; none on CPUs, where engines and trainer share the host's memory.

    Raises ConfigError for a model that cannot be trained with this configuration.
    """
    if layout.cluster.device == "cpu":
        return []
    check_model(hf_config, config.actor.parallel.tp)
    return plan_memory(config, hf_config, layout, gpu_bytes_of(question), draft_vocabulary_of(config))


def gpu_bytes_of(question: Question) -> int:
    import torch

    if question.gpu_memory_gb is not None:
        return int(question.gpu_memory_gb * GB)
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else int(GPU_GB * GB)


def draft_vocabulary_of(config: Config) -> int | None:
    """Return the size of the drafter's vocabulary; None if there is no EAGLE-3 drafter to read it from."""
    path = Path(config.drafter.path or "") / "config.json"
    if algorithm_of(config.speculation).folder is not DrafterFolder.EAGLE3 or not path.is_file():
        return None
    return json.loads(path.read_text()).get("draft_vocab_size")
