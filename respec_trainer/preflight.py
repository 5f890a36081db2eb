"""Check a configuration against files and machine before any process group is made, with errors to act on.

Every rank runs the same checks, so they read only small files: configurations, headers, the tokenizer, the data.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from respec_trainer.config import Config
from respec_trainer.errors import ConfigError
from respec_trainer.network import is_free
from respec_trainer.rewards import setup_reward


def preflight(config: Config, world_size: int, rank: int) -> None:
    """Raise ConfigError or DataError for the first thing found that cannot work."""
    config.check_world(world_size)
    hf_config = check_model_folder(config)
    check_context(config, hf_config)
    check_data(config, hf_config)
    setup_reward(config.reward)
    check_drafter(config, hf_config)
    check_resume(config)
    check_ports(config, rank)


def check_model_folder(config: Config):
    """The actor's Hugging Face config, once its folder is complete and its shape fits this trainer."""
    from transformers import AutoConfig

    from respec_trainer.actor.model import check_model

    folder = Path(config.model.path)
    if not folder.is_dir():
        raise ConfigError(
            f"model.path: no folder {folder}; give a Hugging Face model folder, or run tools/make_actor.py"
        )
    for pattern, what in (("config.json", "config.json"), ("*.safetensors", "weights"), ("tokenizer*", "tokenizer")):
        if not any(folder.glob(pattern)):
            raise ConfigError(f"model.path: {folder} holds no {what} ({pattern})")
    try:
        hf_config = AutoConfig.from_pretrained(folder)
    except (ValueError, OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"model.path: {folder}/config.json cannot be read: {error}") from error
    check_model(hf_config, config.actor.parallel.tp)
    return hf_config


def check_context(config: Config, hf_config) -> None:
    new, context = config.rollout.sampling.max_new_tokens, hf_config.max_position_embeddings
    if new >= context:
        raise ConfigError(
            f"rollout.sampling.max_new_tokens={new} leaves no room for a prompt in the model's {context} positions"
        )


def check_data(config: Config, hf_config) -> None:
    """Every row of the data can be read, and the tokenizer fits the model."""
    from transformers import AutoTokenizer

    from respec_trainer.data.prompts import check_tokenizer_fits, read_rows

    for _ in read_rows(config.data):
        pass
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    except (ValueError, OSError) as error:
        raise ConfigError(f"model.path: the tokenizer in {config.model.path} cannot be read: {error}") from error
    check_tokenizer_fits(tokenizer, hf_config, config.model.path)


def check_drafter(config: Config, hf_config) -> None:
    """What drafter.path names can draft for the model, by speculation.algorithm."""
    if config.speculation.algorithm == "eagle3":
        from respec_trainer.drafter.format import check_drafter_folder

        check_drafter_folder(Path(config.drafter.path), hf_config)
        check_rejection_sampling(config)
        check_profile(config, hf_config)
    elif config.speculation.algorithm == "standalone":
        from respec_trainer.actor.check import check_model
        from respec_trainer.compat import resolve_device
        from respec_trainer.drafter.standalone import check_standalone

        device = resolve_device(config.run.device)
        drafter = check_standalone(config.drafter.path, config.model.path, hf_config, device)
        try:
            check_model(drafter, tp=1)  # what the actor can be, the engine can load
        except ConfigError as error:
            raise ConfigError(str(error).replace("model.path", "drafter.path")) from error


def check_profile(config: Config, hf_config) -> None:
    """An adaptive run's profile is of this run."""
    from respec_trainer.compat import resolve_device
    from respec_trainer.speculation.settings import step_settings

    step_settings(config, hf_config, resolve_device(config.run.device))


def check_rejection_sampling(config: Config) -> None:
    """The drafter's law must be over the target's own vocabulary."""
    if not config.speculation.rejection_sampling:
        return
    drafter = json.loads((Path(config.drafter.path) / "config.json").read_text())
    size, full = drafter["draft_vocab_size"], drafter["vocab_size"]
    if size != full:
        raise ConfigError(
            f"speculation.rejection_sampling needs a drafter of the full vocabulary, but draft_vocab_size in "
            f"{config.drafter.path} is {size} of {full}; train one with all {full} tokens, or set "
            "speculation.rejection_sampling=false"
        )


def check_resume(config: Config) -> None:
    """A checkpoint that is named is there; whether it is valid is found when it is read."""
    if config.checkpoint.resume not in ("auto", "never"):
        from respec_trainer.checkpoint.resume import candidates

        candidates(config, Path())


def check_ports(config: Config, rank: int) -> None:
    """Ports this run will listen on are free; only the rank that will listen looks."""
    if rank != 0:
        return
    master = os.environ.get("MASTER_PORT")
    if master and not is_free(int(master)):
        raise ConfigError(f"port {master}, where the ranks are to meet, is occupied; start with --master_port ANOTHER")
    if config.resync.port and not is_free(config.resync.port):
        raise ConfigError(
            f"resync.port={config.resync.port} is occupied; choose another, or leave it out for a free one"
        )
