"""Hugging Face <-> Megatron weights: one rule for each parameter and both directions, with one parameter in memory.

The rules belong to the model family (models/). Each gives a Layout: a sequence of segments of Hugging Face tensors. The
segments in order form the Megatron parameter; sorted by source they form the Hugging Face tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch

from respec_trainer.models.layout import Layout, Segment
from respec_trainer.models.registry import family_of

# read(name, index) returns the part of Hugging Face tensor `name` that `index`, a tuple of slices, selects.
Reader = Callable[[str, tuple[slice, ...]], torch.Tensor]


def megatron_shapes(config, tp: int) -> dict[str, tuple[int, ...]]:
    """Return the parameters of the Megatron model of Hugging Face `config`, with the shape of one of `tp` shards.

    They are in the order of the Hugging Face tensors, which files also keep.
    """
    kinds = family_of(config).in_layer
    layers = [f"decoder.layers.{layer}.{kind}" for layer in range(config.num_hidden_layers) for kind in kinds]
    last = [] if config.tie_word_embeddings else ["output_layer.weight"]
    names = ["embedding.word_embeddings.weight", *layers, "decoder.final_layernorm.weight", *last]
    return {name: _shard_shape(name, config, tp) for name in names}


def megatron_shard(name: str, read: Reader, config, tp_rank: int, tp: int) -> torch.Tensor:
    """Return tensor-parallel rank `tp_rank`'s shard of Megatron parameter `name`, contiguous; read only its entries.

    `config` is the Hugging Face config. Padded vocabulary rows are zero. The result may be the tensor that `read`
    returned: copy it before writing into it.
    """
    layout = parameter_layout(name, config, tp)
    if layout.dim is None:
        return read(layout.segments[0].source, ()).contiguous()
    cut = layout.cut(tp_rank, tp)
    parts = [_read(part, read, layout.dim) for part in cut if part.source is not None]
    padding = sum(part.length for part in cut if part.source is None)
    if padding:  # perhaps the whole shard: then an empty range of rows gives dtype and width
        rows = parts or [_read(Segment(layout.segments[0].source, 0, 0), read, layout.dim)]
        parts = [*rows, rows[0].new_zeros(padding, *rows[0].shape[1:])]
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, layout.dim)  # one part needs no copy


def to_hf(name: str, shards: Sequence[torch.Tensor], config) -> list[tuple[str, torch.Tensor]]:
    """Return copies of the Hugging Face tensors, as (name, tensor), of Megatron parameter `name`, without padding.

    Args:
        shards: the shards of all tensor-parallel ranks, in order. A replicated parameter needs only one.
    """
    shapes = hf_shapes(name, shards[0].shape, config, len(shards))
    out = {source: shards[0].new_empty(shape) for source, shape in shapes.items()}
    copy_to_hf(name, shards, config, out)
    return list(out.items())


def hf_model_shapes(config) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the Hugging Face tensors that files of the model must hold; tied tensors once."""
    whole = megatron_shapes(config, 1).items()
    return {source: shape for name, held in whole for source, shape in hf_shapes(name, held, config, 1).items()}


def hf_shapes(name: str, shard_shape: Sequence[int], config, tp: int) -> dict[str, tuple[int, ...]]:
    """Return the Hugging Face tensors of Megatron parameter `name`, with their shapes; `shard_shape` is one shard's."""
    layout = parameter_layout(name, config, tp)
    if layout.dim is None:
        return {layout.segments[0].source: tuple(shard_shape)}
    before, after = tuple(shard_shape[: layout.dim]), tuple(shard_shape[layout.dim + 1 :])
    return {source: (*before, extent, *after) for source, extent in layout.extents().items()}


def hf_views(name: str, whole: torch.Tensor, config) -> dict[str, torch.Tensor] | None:
    """Return the Hugging Face tensors of an unsharded Megatron parameter as views; None if their rows are mixed."""
    layout = parameter_layout(name, config, 1)
    sources = [segment.source for segment in layout.segments]
    if layout.dim is None:
        return {sources[0]: whole}
    if len(set(sources)) < len(sources) or None in sources:
        return None
    parts = whole.split([segment.length for segment in layout.segments], layout.dim)
    return dict(zip(sources, parts, strict=True)) if all(part.is_contiguous() for part in parts) else None


def copy_to_hf(name: str, shards: Sequence[torch.Tensor], config, out: Mapping[str, torch.Tensor]) -> None:
    """Copy Megatron parameter `name` into the Hugging Face tensors `out`, with shapes of `hf_shapes`, in their dtype.

    Args:
        shards: the shards of all tensor-parallel ranks, in order. A replicated parameter needs only one.
    """
    tp = len(shards)
    layout = parameter_layout(name, config, tp)
    if layout.dim is None:
        out[layout.segments[0].source].copy_(shards[0])
        return
    for rank, shard in enumerate(shards):
        offset = 0
        for part in layout.cut(rank, tp):
            if part.source is not None:
                rows = shard.narrow(layout.dim, offset, part.length)
                out[part.source].narrow(layout.dim, part.start, part.length).copy_(rows)
            offset += part.length


def parameter_layout(name: str, config, tp: int) -> Layout:
    """Return the layout of Megatron parameter `name`. Raises KeyError if models of this family have no such name."""
    family = family_of(config)
    if name in family.outside:
        return family.outside[name](config, tp, "")
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if match is None or match[2] not in family.in_layer:
        raise KeyError(f"no Hugging Face counterpart of Megatron parameter {name!r} is known in {family.model_type}")
    return family.in_layer[match[2]](config, tp, f"{family.names.layers}.{match[1]}.")


def _shard_shape(name: str, config, tp: int) -> tuple[int, ...]:
    layout = parameter_layout(name, config, tp)
    if layout.dim is None:
        return (layout.segments[0].length,)
    share = sum(segment.length for segment in layout.segments) // tp
    if name.endswith("bias"):
        return (share,)
    return (share, config.hidden_size) if layout.dim == 0 else (config.hidden_size, share)


def _read(part: Segment, read: Reader, dim: int) -> torch.Tensor:
    index = slice(part.start, part.start + part.length)
    return read(part.source, (slice(None),) * dim + (index,))
