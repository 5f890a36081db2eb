"""Check a configuration against files and machine before any process group is made; errors name the remedy.

Every rank runs the same checks, so they read only small files: configurations, headers, the tokenizer, the data.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from respec_trainer.actor.check import check_model
from respec_trainer.compat import resolve_device
from respec_trainer.config import Config
from respec_trainer.data.prompts import check_tokenizer_fits
from respec_trainer.data.rows import read_rows
from respec_trainer.errors import ConfigError, DataError, RewardError
from respec_trainer.network import is_free
from respec_trainer.objective.registry import setup_objective
from respec_trainer.plan.places import Cluster, plan_layout
from respec_trainer.preflight.drafters import check_drafter
from respec_trainer.rewards.contract import RewardItem, score_batch
from respec_trainer.rewards.registry import reward_name, setup_reward
from respec_trainer.telemetry.trackers import check_trackers


def preflight(config: Config, world_size: int, rank: int) -> None:
    """Raise ConfigError or DataError for the first problem."""
    device = resolve_device(config.run.device)
    plan_layout(config, Cluster.of_launcher(device) or Cluster(1, world_size, device))
    hf_config = check_model_folder(config)
    for check in checks(config, hf_config, rank):
        check()


def every_problem(config: Config) -> list[ConfigError]:
    """Return all problems that `preflight` would raise, except those of the ranks' places.

    Without a readable model the checks that need its config are left out.
    """
    problems: list[ConfigError] = []
    hf_config = None
    try:
        hf_config = check_model_folder(config)
    except ConfigError as error:
        problems.append(error)
    for check in checks(config, hf_config, rank=0):
        try:
            check()
        except ConfigError as error:
            problems.append(error)
    return problems


def checks(config: Config, hf_config, rank: int) -> Iterator[Callable[[], None]]:
    """Yield all checks except that of the model's folder; if `hf_config` is None, only those that do not need it."""
    if hf_config is not None:
        yield partial(check_context, config, hf_config)
    yield partial(check_data, config)
    if hf_config is not None:
        yield partial(check_tokenizer, config, hf_config)
    yield partial(check_reward, config, rank)
    yield partial(setup_objective, config.objective)
    if hf_config is not None:
        yield partial(check_drafter, config, hf_config)
    yield partial(check_resume, config)
    yield partial(check_trackers, config.telemetry.trackers)
    yield check_address
    yield partial(check_ports, config, rank)


def check_model_folder(config: Config):
    """Check that the actor's folder is complete and its shape fits this trainer; return its Hugging Face config."""
    folder = Path(config.model.path)
    if not folder.is_dir():
        raise ConfigError(
            f"model.path: no folder {folder}; give a Hugging Face model folder, or run tools/make_actor.py"
        )
    for pattern, what in (("config.json", "config.json"), ("*.safetensors", "weights"), ("tokenizer*", "tokenizer")):
        if not any(folder.glob(pattern)):
            raise ConfigError(f"model.path: {folder} holds no {what} ({pattern})")
    hf_config = read_model_config(folder)
    check_model(hf_config, config.actor.parallel.tp)
    check_engine_split(config, hf_config)
    return hf_config


def read_model_config(path: Path, key: str = "model.path"):
    """Read a Hugging Face config from a model's folder or from a file; `key` names the path in errors."""
    from transformers import AutoConfig

    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"{key}: there is no config.json at {file}")
    try:
        return AutoConfig.from_pretrained(file)
    except (ValueError, OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{key}: {file} cannot be read: {error}") from error


def check_shapes(config: Config, hf_config) -> None:
    """Raise ConfigError unless the model's config fits; the model's files are not needed."""
    check_model(hf_config, config.actor.parallel.tp)
    check_engine_split(config, hf_config)
    check_context(config, hf_config)


def check_engine_split(config: Config, hf_config) -> None:
    """Raise ConfigError unless the model can be split over an engine's ranks, by the same rules as for the actor."""
    check_model(hf_config, config.rollout.engine.tp, tp_key="rollout.engine.tp")


def check_context(config: Config, hf_config) -> None:
    new, context = config.rollout.sampling.max_new_tokens, hf_config.max_position_embeddings
    if new >= context:
        raise ConfigError(
            f"rollout.sampling.max_new_tokens={new} leaves no room for a prompt in the model's {context} positions"
        )


def check_data(config: Config) -> None:
    """Read every row of the data. Raises DataError for the first that cannot be read."""
    for _ in read_rows(config.data):
        pass


def check_reward(config: Config, rank: int) -> None:
    """Set up the reward and score an empty response to the first row, which every policy may produce.

    Only rank 0 calls the reward, because a call may cost money or time. The result None (skip the sample) is valid.
    Raises ConfigError if the reward fails or its result is not valid.
    """
    reward = setup_reward(config.reward)
    if rank != 0:
        return
    try:
        row = next(read_rows(config.data))
    except DataError:
        return  # check_data reports it
    prompt = config.data.template.replace("{prompt}", row.prompt)
    item = RewardItem(prompt, response="", response_ids=(), truncated=False, answer=row.answer, row=row.others)
    try:
        score_batch(reward_name(config.reward), reward, [item])
    except RewardError as error:
        raise ConfigError(f"tried on an empty response to the first row of data.path: {error}") from error


def check_tokenizer(config: Config, hf_config) -> None:
    """Raise ConfigError unless the tokenizer can be read and fits the model."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    except (ValueError, OSError) as error:
        raise ConfigError(f"model.path: the tokenizer in {config.model.path} cannot be read: {error}") from error
    check_tokenizer_fits(tokenizer, hf_config, config.model.path)


def check_resume(config: Config) -> None:
    """Raise ConfigError if a named checkpoint does not exist; loading it checks its contents."""
    if config.checkpoint.resume not in ("auto", "never"):
        from respec_trainer.checkpoint.resume import candidates

        candidates(config, Path())


def check_address() -> None:
    """Raise ConfigError if the host in MASTER_ADDR has no address; a host that does not answer is found later."""
    address = os.environ.get("MASTER_ADDR")
    if not address:
        return
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise ConfigError(
            f"MASTER_ADDR={address}, where the ranks are to meet, cannot be resolved on {socket.gethostname()} "
            f"({error.strerror}); give --master_addr an address that all hosts can reach"
        ) from error


def check_ports(config: Config, rank: int) -> None:
    """Raise ConfigError if a port that this run will listen on is occupied; only rank 0 checks, because it listens."""
    if rank != 0:
        return
    master = os.environ.get("MASTER_PORT")
    # torchrun's own agent listens there, and the ranks meet in its store.
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if master and not agents and not is_free(int(master)):
        raise ConfigError(f"port {master}, where the ranks are to meet, is occupied; start with --master_port ANOTHER")
    if config.resync.port and not is_free(config.resync.port):
        raise ConfigError(
            f"resync.port={config.resync.port} is occupied; choose another, or leave it out for a free one"
        )
