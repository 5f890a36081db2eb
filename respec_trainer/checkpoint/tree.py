"""State as a tree: dicts, lists and tuples of tensors, numbers, strings, booleans and None, in one safetensors file.

Tensors are tensors of the file, the rest is JSON in its metadata; so reading a checkpoint never runs code from it. A
tree that is read has the same types, also of keys that are numbers, and the same bits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from respec_trainer.checkpoint.files import Facts, can_hold, write_tensors
from respec_trainer.errors import ConfigError
from respec_trainer.weights.safetensors_io import open_safetensors

SCALARS = (str, bool, int, float, type(None))


def copy_tree(tree: Any, immutable: Sequence[str] = (), path: str = "") -> Any:
    """Return the tree with copies of its tensors in host memory, which later steps do not change.

    Args:
        immutable: paths such as "learner/buffer" below which tensors on the CPU never change: they are not copied.
    """
    if isinstance(tree, torch.Tensor):
        same = any(path == part or path.startswith(f"{part}/") for part in immutable)
        return tree.detach().to("cpu", copy=not same)
    if isinstance(tree, Mapping):
        return {key: copy_tree(value, immutable, f"{path}/{key}".lstrip("/")) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        items = [copy_tree(value, immutable, f"{path}/{index}".lstrip("/")) for index, value in enumerate(tree)]
        return tuple(items) if isinstance(tree, tuple) else items
    if isinstance(tree, SCALARS):
        return tree
    raise TypeError(f"{path}: {type(tree).__name__} has no place in a checkpoint")


def save_tree(path: Path, tree: Any) -> Facts:
    """Write a tree of CPU tensors. Raises TypeError, with its path, for a value of another type."""
    tensors: dict[str, torch.Tensor] = {}
    plain = _plain(tree, "", tensors)
    return write_tensors(path, tensors, {"tree": json.dumps(plain)})


def load_tree(path: Path) -> Any:
    """Read the tree in `path`, with tensors on the CPU. Raises ConfigError for a file that holds none."""
    file = open_safetensors(path)
    metadata = file.metadata() or {}
    if "tree" not in metadata:
        raise ConfigError(f"{path} is not a file of states, as checkpoints have them in ranks/")
    return _whole(json.loads(metadata["tree"]), file)


def _plain(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Return `value` as JSON data, and add its tensors to `tensors`. All but scalars become {kind: content}."""
    if isinstance(value, torch.Tensor):
        if not can_hold(value.dtype):
            raise TypeError(f"{path}: a tensor of {value.dtype} has no place in a checkpoint")
        name = f"{len(tensors)}:{path}"  # paths alone may be equal: keys may contain slashes, or be 0 and "0"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, SCALARS):
                raise TypeError(f"{path}: a key that is a {type(key).__name__} has no place in a checkpoint")
        return {"dict": [[key, _plain(item, f"{path}/{key}".lstrip("/"), tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [_plain(item, f"{path}/{index}".lstrip("/"), tensors) for index, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if isinstance(value, SCALARS):
        return value
    raise TypeError(f"{path}: {type(value).__name__} has no place in a checkpoint")


def _whole(plain: Any, file: safe_open) -> Any:
    if not isinstance(plain, dict):
        return plain
    ((kind, content),) = plain.items()
    if kind == "tensor":
        return file.get_tensor(content)
    if kind == "dict":
        return {key: _whole(item, file) for key, item in content}
    items = [_whole(item, file) for item in content]
    return tuple(items) if kind == "tuple" else items
