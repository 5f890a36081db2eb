"""Check that a drafter's folder fits its target model: config keys, tensors and vocabulary maps.

Each error names the key or the tensor, both values, and what to do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from respec_trainer.drafter.shape import DrafterShape
from respec_trainer.drafter.vocabulary import ids_from_d2t, t2d
from respec_trainer.errors import ConfigError
from respec_trainer.models.feature_layers import default_feature_layers
from respec_trainer.models.llama import EAGLE3_DRAFTER
from respec_trainer.models.rules import head_dim
from respec_trainer.weights.hf_folder import HFFolder

REMEDY = "train a drafter for this actor with tools/train_drafter.py"
# The drafter of eagle3.py has these values, or lacks the key. With other values SGLang computes a different model.
PLAIN: dict[str, Any] = {
    "num_hidden_layers": 1,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "bias": False,
    "tie_word_embeddings": False,
    "norm_output": False,
    "fc_norm": False,
    "norm_before_fc": False,
    "use_aux_norm": False,
    "num_aux_hidden_states": 3,
}


def shape_for_target(folder: Path, hf_config) -> DrafterShape:
    """Read the shape from `folder`'s config.json. Raises ConfigError if it does not fit the target of `hf_config`."""
    path = folder / "config.json"
    config = _read(path)
    _check_plain(config, path)
    required = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "max_position_embeddings")
    for key in (*required, "rms_norm_eps", "draft_vocab_size"):
        if config.get(key) is None:
            raise ConfigError(f"drafter.path: {path} has no {key}; {REMEDY}")
    rope = _rope(config)
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    pairs = {key: (config[key], getattr(hf_config, key)) for key in ("hidden_size", "vocab_size")}
    pairs["head_dim"] = (size, head_dim(hf_config))
    pairs["rope_theta and rope_scaling"] = (rope, _rope({"rope_parameters": hf_config.rope_parameters}))
    pairs["max_position_embeddings"] = (config["max_position_embeddings"], hf_config.max_position_embeddings)
    for key, (drafter, target) in pairs.items():
        if drafter != target:
            raise ConfigError(
                f"drafter.path: {key} in {path} is {drafter}, but {target} in the target of model.path; {REMEDY}"
            )
    return DrafterShape(
        **{key: config[key] for key in required},
        num_key_value_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        head_dim=size,
        rms_norm_eps=config["rms_norm_eps"],
        draft_vocab_size=config["draft_vocab_size"],
        rope=dict(hf_config.rope_parameters),  # equal, as checked above, and in the target's order
        feature_layers=_feature_layers(config, path, hf_config.num_hidden_layers),
        target_layers=hf_config.num_hidden_layers,
        bos_token_id=config.get("bos_token_id"),
        eos_token_id=config.get("eos_token_id"),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"drafter.path: {path} cannot be read: {error}; {REMEDY}") from error
    if not isinstance(config, dict) or config.get("architectures") != [EAGLE3_DRAFTER]:
        found = config.get("architectures") if isinstance(config, dict) else type(config).__name__
        raise ConfigError(f"drafter.path: architectures in {path} must be ['{EAGLE3_DRAFTER}'], not {found}; {REMEDY}")
    return config


def _check_plain(config: dict[str, Any], path: Path) -> None:
    settings = config | (config.get("eagle_config") or {})
    for key, plain in PLAIN.items():
        value = settings.get(key)
        if value is not None and value != plain:
            raise ConfigError(f"drafter.path: {key}={value!r} in {path}, but only {plain!r} is supported; {REMEDY}")
    if not settings.get("use_aux_hidden_state", True):
        raise ConfigError(f"drafter.path: eagle_config.use_aux_hidden_state in {path} must be true; {REMEDY}")


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Return rope_type, rope_theta and the type's numbers from a config, under its new or its old keys."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = rope.pop("rope_type", None) or rope.get("type") or "default"
    rope.pop("type", None)
    theta = rope.pop("rope_theta", None) or config.get("rope_theta", 10000.0)
    return {"rope_type": kind, "rope_theta": float(theta)} | rope


def _feature_layers(config: dict[str, Any], path: Path, target_layers: int) -> tuple[int, int, int]:
    key = "eagle_config.eagle_aux_hidden_state_layer_ids"
    named = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    layers = tuple(named or default_feature_layers(target_layers))
    problem = None
    if len(layers) != 3 or len(set(layers)) != 3:
        problem = "must be three different layers"
    elif not all(isinstance(layer, int) and 0 <= layer < target_layers - 1 for layer in layers):
        problem = f"must be layers 0 to {target_layers - 2}, below the last of the target's {target_layers}"
    if problem:
        origin = "as given" if named else "SGLang's default, because the config names none"
        raise ConfigError(f"drafter.path: {key} in {path} {problem}, not {list(layers)} ({origin}); {REMEDY}")
    return layers


def check_tensors(files: HFFolder, expected: dict[str, tuple[int, ...]], optional: set[str]) -> None:
    """Raise ConfigError unless the folder holds tensors of exactly these names and shapes; `optional` may be absent."""
    names = files.names()
    missing, extra = sorted(set(expected) - names - optional), sorted(names - set(expected))
    if missing or extra:
        parts = [f"{what} {', '.join(some)}" for what, some in (("lacks", missing), ("has unknown", extra)) if some]
        raise ConfigError(f"drafter.path: {files.folder} {' and '.join(parts)}; {REMEDY}")
    for name in sorted(names):
        if files.shape(name) != expected[name]:
            raise ConfigError(
                f"drafter.path: {name} in {files.folder} has shape {list(files.shape(name))}, but config.json asks for "
                f"{list(expected[name])}; {REMEDY}"
            )


def check_maps(files: HFFolder, shape: DrafterShape) -> None:
    """Raise ConfigError unless d2t and t2d describe the same draft vocabulary, in ascending order."""
    difference, held = files.read("d2t"), files.read("t2d")
    if difference.is_floating_point() or held.dtype != torch.bool:
        raise ConfigError(
            f"drafter.path: d2t in {files.folder} must be of integers and t2d of booleans, not {difference.dtype} and "
            f"{held.dtype}; {REMEDY}"
        )
    ids = ids_from_d2t(difference.long())
    inside = int(ids.min()) >= 0 and int(ids.max()) < shape.vocab_size
    if not inside or not bool((ids.diff() > 0).all()) or not torch.equal(t2d(ids, shape.vocab_size), held):
        raise ConfigError(
            f"drafter.path: d2t and t2d in {files.folder} disagree: draft id + d2t must be the ascending ids where "
            f"t2d is true (d2t is a difference); {REMEDY}"
        )
