"""A drafter as a folder that stock SGLang 0.5.21 loads: config.json and model.safetensors.

SGLang ignores unknown tensors and leaves missing ones at their initial values, both without an error, and does not
check most of the config. So this module checks everything, when it writes a drafter and when it reads one.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from respec_trainer.drafter.compatibility import check_maps, check_tensors, shape_for_target
from respec_trainer.drafter.eagle3 import Eagle3Drafter
from respec_trainer.drafter.shape import DrafterShape
from respec_trainer.drafter.vocabulary import FIXED, d2t, ids_from_d2t, t2d
from respec_trainer.dtypes import long_name
from respec_trainer.errors import ConfigError, RespecError
from respec_trainer.models.feature_layers import default_feature_layers
from respec_trainer.models.llama import EAGLE3_DRAFTER, LLAMA
from respec_trainer.weights.hf_folder import HFFolder


def drafter_config(shape: DrafterShape, dtype: torch.dtype = torch.bfloat16) -> dict:
    """The contents of config.json. `norm_output`, `fc_norm` and `norm_before_fc` stay unset: Eagle3Drafter has none."""
    # rope_parameters and rope_scaling both hold all keys, in the target's order. transformers builds one from the
    # other, and SGLang shares one rope cache between target and drafter only if the order of the keys agrees too.
    rope = dict(shape.rope)
    config = {
        "architectures": [EAGLE3_DRAFTER],
        "model_type": LLAMA.model_type,
        "torch_dtype": long_name(dtype),
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": 1,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": shape.rms_norm_eps,
        "attention_bias": False,
        "vocab_size": shape.vocab_size,
        "draft_vocab_size": shape.draft_vocab_size,
        "tie_word_embeddings": False,
        "max_position_embeddings": shape.max_position_embeddings,
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope.get("rope_type", "default") == "default" else rope,
        "bos_token_id": shape.bos_token_id,
        "eos_token_id": shape.eos_token_id,
    }
    if shape.feature_layers != default_feature_layers(shape.target_layers):
        config["eagle_config"] = {
            "use_aux_hidden_state": True,
            "eagle_aux_hidden_state_layer_ids": list(shape.feature_layers),
        }
    return config


def save_drafter(
    drafter: Eagle3Drafter, draft_ids: torch.Tensor, folder: Path | str, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write a drafter with draft vocabulary `draft_ids` [Vd]. Afterwards `folder` is complete, or absent.

    Raises FileExistsError if `folder` exists, and RespecError if weights are not finite or the file does not read back
    bit for bit.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists; move it away, nothing is overwritten")
    tensors = _tensors(drafter, draft_ids, dtype)
    unfinished = folder.with_name(folder.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    (unfinished / "config.json").write_text(json.dumps(drafter_config(drafter.shape, dtype), indent=2) + "\n")
    save_file(tensors, unfinished / "model.safetensors", metadata={"format": "pt"})
    _check_written(unfinished, tensors)
    unfinished.rename(folder)


def load_drafter(
    folder: Path | str, hf_config, dtype: torch.dtype | None = torch.float32
) -> tuple[Eagle3Drafter, torch.Tensor]:
    """Read the drafter in `folder`, made for the target of `hf_config`, and its draft vocabulary [Vd].

    Weights are converted to `dtype`; None keeps the saved one. Use float32 to train further. Raises ConfigError as
    `check_drafter_folder` does.
    """
    folder = Path(folder)
    check_drafter_folder(folder, hf_config)
    with torch.device("meta"):
        drafter = Eagle3Drafter(shape_for_target(folder, hf_config))
    with HFFolder(folder) as files:
        weights = {name: files.read(name) for name in files.names() - set(FIXED)}
        ids = ids_from_d2t(files.read("d2t"))
    drafter.load_state_dict(weights, strict=True, assign=True)
    return drafter.to(dtype) if dtype else drafter, ids


def check_drafter_folder(folder: Path | str, hf_config) -> None:
    """Raise ConfigError unless `folder` holds a drafter for the target of `hf_config`, complete and consistent.

    Reads the config, the headers and the vocabulary maps, not the weights.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(
            f"drafter.path: no folder {folder}; train a drafter for this actor with tools/train_drafter.py"
        )
    shape = shape_for_target(folder, hf_config)
    with HFFolder(folder) as files:
        check_tensors(files, _expected_shapes(shape), optional={"embed_tokens.weight"})
        check_maps(files, shape)


def _expected_shapes(shape: DrafterShape) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        state = Eagle3Drafter(shape).state_dict()
    maps = {"d2t": (shape.draft_vocab_size,), "t2d": (shape.vocab_size,)}
    embedding = {"embed_tokens.weight": (shape.vocab_size, shape.hidden_size)}
    return {name: tuple(tensor.shape) for name, tensor in state.items()} | maps | embedding


def _tensors(drafter: Eagle3Drafter, draft_ids: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    shape = drafter.shape
    if len(draft_ids) != shape.draft_vocab_size:
        raise ValueError(f"{len(draft_ids)} draft ids for a drafter of draft_vocab_size {shape.draft_vocab_size}")
    ids = draft_ids.cpu()
    tensors = {name: t.detach().cpu().to(dtype).contiguous() for name, t in drafter.state_dict().items()}
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise RespecError(f"the drafter's {', '.join(broken)} hold NaN or infinite values; it is not saved")
    return tensors | {"d2t": d2t(ids), "t2d": t2d(ids, shape.vocab_size)}


def _check_written(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Raise RespecError unless the file holds exactly `tensors`, equal in every bit."""
    with HFFolder(folder) as files:
        if files.names() != set(tensors):
            raise RespecError(f"{folder}: tensors {sorted(files.names() ^ set(tensors))} differ from those written")
        for name, tensor in tensors.items():
            read = files.read(name)
            same = read.dtype == tensor.dtype and read.shape == tensor.shape
            if not same or not torch.equal(read.view(torch.uint8), tensor.view(torch.uint8)):
                raise RespecError(f"{folder}: {name} does not read back as written; check the disk")
