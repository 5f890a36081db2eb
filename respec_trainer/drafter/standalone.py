"""Check that an ordinary, smaller model can draft for the target."""

from __future__ import annotations

import json
from pathlib import Path

from respec_trainer.errors import ConfigError

REMEDY = "choose a smaller model of the target's own family"


def check_standalone(folder: str, target_folder: str, target_config, device: str):
    """Return the drafter's config. Raises ConfigError if it cannot draft for the target on `device` ("cpu" or "cuda").

    It must have the target's vocabulary and tokenizer, and at least as many positions.
    """
    if device != "cpu":
        raise ConfigError(
            "speculation.algorithm=standalone does not work on GPUs yet: the engine sleeps while the actor trains, and "
            "the drafter's weights would be lost, because no push restores them; set speculation.algorithm=eagle3, "
            "ngram or none"
        )
    config = _read_config(Path(folder))
    for key in ("vocab_size", "max_position_embeddings"):
        drafter, target = getattr(config, key), getattr(target_config, key)
        if drafter < target or (key == "vocab_size" and drafter != target):
            raise ConfigError(
                f"drafter.path: {key} in {folder}/config.json is {drafter}, but {target} in the target of model.path; "
                f"{REMEDY}"
            )
    _check_tokenizers(folder, target_folder)
    return config


def _read_config(folder: Path):
    from transformers import AutoConfig

    if not folder.is_dir():
        raise ConfigError(f"drafter.path: no folder {folder}; speculation.algorithm=standalone needs a model's folder")
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"drafter.path: {folder} holds no weights (*.safetensors)")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"drafter.path: {folder}/config.json cannot be read: {error}") from error
    if "Eagle" in str(config.architectures):
        raise ConfigError(
            f"drafter.path: {folder} holds an EAGLE drafter ({config.architectures[0]}), not a model; set "
            "speculation.algorithm=eagle3"
        )
    return config


def _check_tokenizers(folder: str, target_folder: str) -> None:
    from transformers import AutoTokenizer

    vocabularies = []
    for key, path in (("drafter.path", folder), ("model.path", target_folder)):
        try:
            vocabularies.append(AutoTokenizer.from_pretrained(path).get_vocab())
        except (ValueError, OSError) as error:
            raise ConfigError(f"{key}: the tokenizer in {path} cannot be read: {error}") from error
    if vocabularies[0] != vocabularies[1]:
        differing = dict(set(vocabularies[0].items()) ^ set(vocabularies[1].items()))
        token = min(differing)
        ids = [vocabulary.get(token) for vocabulary in vocabularies]
        raise ConfigError(
            f"drafter.path: the tokenizer in {folder} is not the target's: {token!r} is token {ids[0]}, but {ids[1]} "
            f"in {target_folder}; {REMEDY}"
        )
