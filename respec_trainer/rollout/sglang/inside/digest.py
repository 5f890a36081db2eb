"""Digests of the weights an engine holds, one for each tensor as it was sent.

Runs inside sglang's scheduler, in place of its own checksums: those are of sglang's fused tensors, which nobody sends,
and need CUDA. Here a fused tensor is taken apart into the rows that were sent by name, shards of several ranks are put
together, and padding is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from respec_trainer.models.base import Family
from respec_trainer.models.llama import LLAMA
from respec_trainer.models.names import Names, leaf
from respec_trainer.models.registry import family_of
from respec_trainer.rollout.digest import digest

DRAFTER = "LlamaForCausalLMEagle3"  # sglang's class of EAGLE-3 drafters: a Llama, whatever its config's model_type


def digest_hooks() -> dict[str, tuple[Any, str]]:
    """For the plugin: target -> (function, kind of hook)."""
    return {"sglang.srt.utils.weight_checker.WeightChecker._compute_checksum": (_checksums, "REPLACE")}


def named_parts(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of one of sglang's models under the names of unfused ones, whole.

    With tensor parallelism every rank has to go through them, all in step: shards are gathered as they are reached.
    """
    family = _family(model)
    names, config = family.names, model.config
    for path, module in model.named_modules():
        parent, _, last = path.rpartition(".")
        for name, parameter in module.named_parameters(recurse=False):
            if last in family.fused:
                parts = family.fused[last]
                for part, rows in zip(parts, _split(module, parameter, len(parts)), strict=True):
                    # Fewer key and value heads than ranks: neighbors hold the same one.
                    copies = getattr(module, "num_kv_head_replicas", 1) if part in _keys_and_values(names) else 1
                    whole = _whole(module, name, rows, copies)
                    yield f"{parent}.{part}.{name}", whole[: _true_size(part, names, config, module)]
            else:
                rows = getattr(module, "org_vocab_size", None)  # a vocabulary is padded, at its end
                whole = _whole(module, name, parameter)[:rows]
                columns = _true_size(last, names, config, module) if whole.dim() == 2 else None
                yield f"{path}.{name}", whole if columns is None else whole[:, :columns]


def _family(model: torch.nn.Module) -> Family:
    return LLAMA if type(model).__name__ == DRAFTER else family_of(model.config)


def _split(module: torch.nn.Module, parameter: torch.Tensor, parts: int) -> tuple[torch.Tensor, ...]:
    if hasattr(module, "q_proj_shard_size"):  # sglang's QKVParallelLinear, whatever the family calls its parts
        return parameter.split([module.q_proj_shard_size, module.kv_proj_shard_size, module.v_proj_shard_size])
    return parameter.chunk(parts)


def _keys_and_values(names: Names) -> tuple[str, ...]:
    return leaf(names.key), leaf(names.value)


def _true_size(part: str, names: Names, config: Any, module: torch.nn.Module) -> int | None:
    """Without what sglang adds at the end on a CPU, so that its ranks have equal shares of heads and hidden units."""
    if part in map(leaf, (names.gate, names.up, names.down)):
        return getattr(config, "original_intermediate_size", None)
    kind = "total_num_kv_heads" if part in _keys_and_values(names) else "num_attention_heads"
    heads, output = getattr(config, f"original_{kind}", None), leaf(names.attention_output)
    if heads is None or part not in (leaf(names.query), *_keys_and_values(names), output):
        return None
    return heads * (module.input_size // config.num_attention_heads if part == output else module.head_size)


def _whole(module: torch.nn.Module, name: str, shard: torch.Tensor, copies: int = 1) -> torch.Tensor:
    """A weight of which every tensor-parallel rank holds a shard; `copies` neighboring ranks hold the same one."""
    signs = ("output_size_per_partition", "input_is_parallel", "org_vocab_size")  # of sglang's parallel layers
    if not any(hasattr(module, sign) for sign in signs) or getattr(module, "tp_size", 1) == 1:
        return shard
    by_columns = hasattr(module, "input_is_parallel")  # sglang's RowParallelLinear, whose bias every rank holds whole
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
