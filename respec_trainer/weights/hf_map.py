"""Hugging Face <-> Megatron weights: one rule a parameter, both directions, nothing but that parameter in memory.

A rule is a Layout. Megatron's whole parameter is a row of segments, each a range of a Hugging Face tensor along one
dimension, and tensor-parallel rank r holds the r-th of `tp` equal cuts of that row. Reading the row from left to right
gives a shard, sorting its segments gives back the Hugging Face tensors. For example with tp=2 and two key/value heads:

    linear_qkv  [ q heads of group 0 | k_0 | v_0 | q heads of group 1 | k_1 | v_1 ]      cut in two
    linear_fc1  [ gate, first half | up, first half | gate, second half | up, second half ]   cut in two
    embedding   [ embed_tokens | rows of zeros up to a multiple of tp ]                   cut in two
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

# read(name, index) returns the part of Hugging Face tensor `name` that `index`, a tuple of slices, selects.
Reader = Callable[[str, tuple[slice, ...]], torch.Tensor]


@dataclass(frozen=True)
class Segment:
    """Entries start .. start + length of Hugging Face tensor `source`; of padding, where `source` is None."""

    source: str | None
    start: int
    length: int


@dataclass(frozen=True)
class Layout:
    """How one Megatron parameter is made. `dim` is where it is cut over tensor-parallel ranks; None: replicated."""

    dim: int | None
    segments: tuple[Segment, ...]

    def extents(self) -> dict[str, int]:
        """Size along `dim` that each Hugging Face tensor must have; empty for a replicated parameter."""
        sizes: dict[str, int] = {}
        for segment in self.segments if self.dim is not None else ():
            if segment.source is not None:
                sizes[segment.source] = sizes.get(segment.source, 0) + segment.length
        return sizes

    def cut(self, rank: int, tp: int) -> list[Segment]:
        """The segments, or parts of segments, in the `rank`-th of `tp` equal cuts."""
        share = sum(segment.length for segment in self.segments) // tp
        low, high, offset, inside = rank * share, (rank + 1) * share, 0, []
        for segment in self.segments:
            first, last = max(low, offset), min(high, offset + segment.length)
            if first < last:
                inside.append(Segment(segment.source, segment.start + first - offset, last - first))
            offset += segment.length
        return inside


def head_dim(config) -> int:
    """Size of one attention head; Qwen2's config does not name it."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def padded_vocab_size(config, tp: int) -> int:
    """Vocabulary rows Megatron holds: the next multiple of `tp`."""
    return -(-config.vocab_size // tp) * tp


def megatron_shapes(config, tp: int) -> dict[str, tuple[int, ...]]:
    """The parameters of the Megatron model of Hugging Face `config`, and the shape of one of `tp` shards of each.

    In the order of the Hugging Face tensors, which files that hold them keep too.
    """
    kinds = [kind for kind in _IN_LAYER if _has(config, kind)]
    layers = [f"decoder.layers.{layer}.{kind}" for layer in range(config.num_hidden_layers) for kind in kinds]
    last = [] if config.tie_word_embeddings else ["output_layer.weight"]
    names = ["embedding.word_embeddings.weight", *layers, "decoder.final_layernorm.weight", *last]
    return {name: _shard_shape(name, config, tp) for name in names}


def megatron_shard(name: str, read: Reader, config, tp_rank: int, tp: int) -> torch.Tensor:
    """Tensor-parallel rank `tp_rank`'s shard of Megatron parameter `name`, contiguous, reading no more than it holds.

    `config` is the Hugging Face config. Padded vocabulary rows are zero. What was read may be returned as it is: copy
    it before writing into it.
    """
    layout = parameter_layout(name, config, tp)
    if layout.dim is None:
        return read(layout.segments[0].source, ()).contiguous()
    cut = layout.cut(tp_rank, tp)
    parts = [_read(part, read, layout.dim) for part in cut if part.source is not None]
    padding = sum(part.length for part in cut if part.source is None)
    if padding:  # possibly all of the cut: then a range of no rows tells dtype and width
        rows = parts or [_read(Segment(layout.segments[0].source, 0, 0), read, layout.dim)]
        parts = [*rows, rows[0].new_zeros(padding, *rows[0].shape[1:])]
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, layout.dim)  # one part needs no second copy


def to_hf(name: str, shards: Sequence[torch.Tensor], config) -> list[tuple[str, torch.Tensor]]:
    """The (name, tensor)s that Megatron parameter `name` is made of, copied; vocabulary padding is dropped.

    Args:
        shards: the shards of all tensor-parallel ranks, in order. A replicated parameter needs only one.
    """
    shapes = hf_shapes(name, shards[0].shape, config, len(shards))
    out = {source: shards[0].new_empty(shape) for source, shape in shapes.items()}
    copy_to_hf(name, shards, config, out)
    return list(out.items())


def hf_model_shapes(config) -> dict[str, tuple[int, ...]]:
    """The Hugging Face tensors of the model of `config`: those that files must hold, tied ones once."""
    whole = megatron_shapes(config, 1).items()
    return {source: shape for name, held in whole for source, shape in hf_shapes(name, held, config, 1).items()}


def hf_shapes(name: str, shard_shape: Sequence[int], config, tp: int) -> dict[str, tuple[int, ...]]:
    """The Hugging Face tensors that Megatron parameter `name` is made of, given the shape of one of its shards."""
    layout = parameter_layout(name, config, tp)
    if layout.dim is None:
        return {layout.segments[0].source: tuple(shard_shape)}
    before, after = tuple(shard_shape[: layout.dim]), tuple(shard_shape[layout.dim + 1 :])
    return {source: (*before, extent, *after) for source, extent in layout.extents().items()}


def hf_views(name: str, whole: torch.Tensor, config) -> dict[str, torch.Tensor] | None:
    """The Hugging Face tensors of an unsharded Megatron parameter, in its own memory; None where they lie mixed."""
    layout = parameter_layout(name, config, 1)
    sources = [segment.source for segment in layout.segments]
    if layout.dim is None:
        return {sources[0]: whole}
    if len(set(sources)) < len(sources) or None in sources:
        return None
    parts = whole.split([segment.length for segment in layout.segments], layout.dim)
    return dict(zip(sources, parts, strict=True)) if all(part.is_contiguous() for part in parts) else None


def copy_to_hf(name: str, shards: Sequence[torch.Tensor], config, out: Mapping[str, torch.Tensor]) -> None:
    """Copy Megatron parameter `name` into the Hugging Face tensors `out`, of `hf_shapes`, casting to their dtype.

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
    """The rule for Megatron parameter `name`. Raises KeyError for a name that no supported model has."""
    if name in _OUTSIDE_LAYERS:
        return _OUTSIDE_LAYERS[name](config, tp)
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if match is None or match[2] not in _IN_LAYER:
        raise KeyError(f"no Hugging Face counterpart of Megatron parameter {name!r} is known")
    return _IN_LAYER[match[2]](config, tp, f"model.layers.{match[1]}.")


def _has(config, kind: str) -> bool:
    """Whether models of this family have a parameter of this kind in their layers."""
    family = {"linear_qkv.bias": "qwen2", "q_layernorm.weight": "qwen3", "k_layernorm.weight": "qwen3"}
    return family.get(kind.partition(".")[2], config.model_type) == config.model_type


def _shard_shape(name: str, config, tp: int) -> tuple[int, ...]:
    layout = parameter_layout(name, config, tp)
    if layout.dim is None:
        per_head = name.endswith(("q_layernorm.weight", "k_layernorm.weight"))
        return (head_dim(config) if per_head else config.hidden_size,)
    share = sum(segment.length for segment in layout.segments) // tp
    if name.endswith("bias"):
        return (share,)
    return (share, config.hidden_size) if layout.dim == 0 else (config.hidden_size, share)


def _read(part: Segment, read: Reader, dim: int) -> torch.Tensor:
    index = slice(part.start, part.start + part.length)
    return read(part.source, (slice(None),) * dim + (index,))


def _replicated(source: str):
    return lambda config, tp, prefix="": Layout(None, (Segment(prefix + source, 0, 0),))


def _vocabulary(source: str):
    def layout(config, tp: int) -> Layout:
        padding = padded_vocab_size(config, tp) - config.vocab_size
        rows = Segment(source, 0, config.vocab_size)
        return Layout(0, (rows, Segment(None, 0, padding)) if padding else (rows,))

    return layout


def _columns(source: str, size: Callable):
    """A row-parallel weight [out, in]: each rank holds some of the columns, whole."""
    return lambda config, tp, prefix: Layout(1, (Segment(prefix + source, 0, size(config)),))


def _qkv(kind: str):
    def layout(config, tp: int, prefix: str) -> Layout:
        head, groups = head_dim(config), config.num_key_value_heads
        queries = config.num_attention_heads // groups * head
        segments: list[Segment] = []
        for group in range(groups):
            for projection, rows in (("q", queries), ("k", head), ("v", head)):
                segments.append(Segment(f"{prefix}self_attn.{projection}_proj.{kind}", group * rows, rows))
        return Layout(0, tuple(segments))

    return layout


def _gate_and_up(config, tp: int, prefix: str) -> Layout:
    rows = config.intermediate_size // tp
    pairs = [(rank, projection) for rank in range(tp) for projection in ("gate", "up")]
    return Layout(0, tuple(Segment(f"{prefix}mlp.{p}_proj.weight", rank * rows, rows) for rank, p in pairs))


_OUTSIDE_LAYERS = {
    "embedding.word_embeddings.weight": _vocabulary("model.embed_tokens.weight"),
    "output_layer.weight": _vocabulary("lm_head.weight"),
    "decoder.final_layernorm.weight": _replicated("model.norm.weight"),
}
_IN_LAYER = {
    "input_layernorm.weight": _replicated("input_layernorm.weight"),
    "self_attention.linear_qkv.weight": _qkv("weight"),
    "self_attention.linear_qkv.bias": _qkv("bias"),
    "self_attention.q_layernorm.weight": _replicated("self_attn.q_norm.weight"),
    "self_attention.k_layernorm.weight": _replicated("self_attn.k_norm.weight"),
    "self_attention.linear_proj.weight": _columns(
        "self_attn.o_proj.weight", lambda config: config.num_attention_heads * head_dim(config)
    ),
    "pre_mlp_layernorm.weight": _replicated("post_attention_layernorm.weight"),
    "mlp.linear_fc1.weight": _gate_and_up,
    "mlp.linear_fc2.weight": _columns("mlp.down_proj.weight", lambda config: config.intermediate_size),
}
