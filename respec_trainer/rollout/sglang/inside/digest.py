"""Digests of an engine's weights, one for each tensor as it was sent.

They are computed inside sglang's scheduler and replace its own checksums, which need CUDA and are of sglang's fused
tensors, while weights are sent unfused. Here fused tensors are split into the rows that were sent by name, shards of
several ranks are joined, and padding is removed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from respec_trainer.models.base import Family
from respec_trainer.models.llama import EAGLE3_DRAFTER, LLAMA
from respec_trainer.models.names import Names, leaf
from respec_trainer.models.registry import family_of
from respec_trainer.rollout.digest import digest


def digest_hooks() -> dict[str, tuple[Any, str]]:
    """Return hooks for the plugin: target -> (function, kind of hook)."""
    return {"sglang.srt.utils.weight_checker.WeightChecker._compute_checksum": (_checksums, "REPLACE")}


def named_parts(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the complete weights of one of sglang's models, unfused, with the names of the unfused weights.

    With tensor parallelism all ranks must iterate together, because shards are gathered on the way.
    """
    family = _family(model)
    names, config = family.names, model.config
    for path, module in model.named_modules():
        parent, _, last = path.rpartition(".")
        for name, parameter in module.named_parameters(recurse=False):
            if last in family.fused:
                parts = family.fused[last]
                for part, rows in zip(parts, _split(module, parameter, len(parts)), strict=True):
                    # With fewer key and value heads than ranks, neighboring ranks hold the same head.
                    copies = getattr(module, "num_kv_head_replicas", 1) if part in _keys_and_values(names) else 1
                    whole = _whole(module, name, rows, copies)
                    yield f"{parent}.{part}.{name}", whole[: _true_size(part, names, config, module)]
            else:
                rows = getattr(module, "org_vocab_size", None)  # a vocabulary has its padding at the end
                whole = _whole(module, name, parameter)[:rows]
                columns = _true_size(last, names, config, module) if whole.dim() == 2 else None
                yield f"{path}.{name}", whole if columns is None else whole[:, :columns]


def _family(model: torch.nn.Module) -> Family:
    return LLAMA if type(model).__name__ == EAGLE3_DRAFTER else family_of(model.config)


def _split(module: torch.nn.Module, parameter: torch.Tensor, parts: int) -> tuple[torch.Tensor, ...]:
    if hasattr(module, "q_proj_shard_size"):  # sglang's QKVParallelLinear, under any family's names
        return parameter.split([module.q_proj_shard_size, module.kv_proj_shard_size, module.v_proj_shard_size])
    return parameter.chunk(parts)


def _keys_and_values(names: Names) -> tuple[str, ...]:
    return leaf(names.key), leaf(names.value)


def _true_size(part: str, names: Names, config: Any, module: torch.nn.Module) -> int | None:
    """Return the size without sglang's padding on a CPU, which gives ranks equal shares of heads and hidden units."""
    if part in map(leaf, (names.gate, names.up, names.down)):
        return getattr(config, "original_intermediate_size", None)
    kind = "total_num_kv_heads" if part in _keys_and_values(names) else "num_attention_heads"
    heads, output = getattr(config, f"original_{kind}", None), leaf(names.attention_output)
    if heads is None or part not in (leaf(names.query), *_keys_and_values(names), output):
        return None
    return heads * (module.input_size // config.num_attention_heads if part == output else module.head_size)


def _whole(module: torch.nn.Module, name: str, shard: torch.Tensor, copies: int = 1) -> torch.Tensor:
    """Gather a weight from the tensor-parallel ranks' shards; `copies` neighboring ranks hold the same shard."""
    marks = ("output_size_per_partition", "input_is_parallel", "org_vocab_size")  # of sglang's parallel layers
    if not any(hasattr(module, mark) for mark in marks) or getattr(module, "tp_size", 1) == 1:
        return shard
    by_columns = hasattr(module, "input_is_parallel")  # sglang's RowParallelLinear; every rank holds its complete bias
    if by_columns and name == "bias":
        return shard
    from sglang.srt.distributed import get_tp_group

    shard = shard.detach().contiguous()
    shards = [torch.empty_like(shard) for _ in range(module.tp_size)]
    torch.distributed.all_gather(shards, shard, group=get_tp_group().device_group)
    return torch.cat(shards[::copies], int(by_columns))


def _checksums(checker: Any, _skip_tensor_list: Any = None, *, role: str) -> dict[str, Any]:
    return {
        "checksums": {name: digest(tensor) for name, tensor in named_parts(checker._get_model())},
        "per_gpu_checksum": "",
        "parallelism_info": checker._parallelism_info(role=role).model_dump(),
    }
