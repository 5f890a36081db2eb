"""The EAGLE-3 drafter, and its draft steps unrolled for all positions at once, as training needs them.

The drafter is one layer whose input is a token's embedding next to a feature. Notation, for tokens x_0 .. x_{S-1}
[B, S]: a_t is the output of the target's three feature layers at t, [B, S, 3H], and e_t the embedding of x_t,
[B, S, H]. From g0_t = fc(a_t), step k is

    g{k+1}_t = midlayer(e_{t+1+k}, g{k}_t)         and lm_head(norm(g{k+1}_t)) predicts x_{t+2+k}.

Step 0 reads the target's features, later steps the drafter's own output, as in serving. A draft that begins at t
attends to the keys of step 0 at positions 0 .. t and to the keys of its own steps 1 .. k; the latter form a diagonal.
(EAGLE-3, arXiv 2503.01840, which calls this unrolling the training-time test.) Parameter names are those of SGLang's
checkpoint format.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from respec_trainer.drafter.shape import DrafterShape, inverse_frequencies

QUERY_BLOCK = 512  # queries whose attention scores are in memory at one time: [B, heads, 512, S]


class Eagle3Drafter(nn.Module):
    """The drafter of `shape`, with random weights from `seed`. It uses the target's token embeddings."""

    def __init__(self, shape: DrafterShape, seed: int = 0):
        super().__init__()
        self.shape = shape
        self.fc = Projection(3 * shape.hidden_size, shape.hidden_size)
        self.midlayer = DraftLayer(shape)
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.lm_head = Projection(shape.hidden_size, shape.draft_vocab_size)
        self._initialize(seed)

    @torch.no_grad()
    def _initialize(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, Projection) and not module.weight.is_meta:
                module.weight.normal_(0.0, 1 / math.sqrt(module.in_features), generator=generator)

    def unroll(self, embeddings: torch.Tensor, features: torch.Tensor, steps: int) -> Iterator[torch.Tensor]:
        """Yield for k = 0 .. steps - 1 the hidden states [B, S, H], normed, whose logits at t predict x_{t+2+k}.

        `embeddings` [B, S, H] and `features` [B, S, 3H] belong to token t at index t; this function shifts them. Rows
        are right-padded; the hidden state at t is meaningful where x_{t+1+k} exists.
        """
        dtype = self.fc.weight.dtype
        embeddings = embeddings.to(dtype)
        feature = self.fc(features.to(dtype))
        frequencies = inverse_frequencies(self.shape.rope, self.shape.head_dim).to(feature.device)
        positions = torch.arange(feature.shape[1], device=feature.device, dtype=torch.float32)
        cache: KeyValues = []
        for k in range(steps):
            angles = (positions + k)[:, None] * frequencies  # [S, d / 2]
            feature = self.midlayer(shift_left(embeddings, 1 + k), feature, angles, cache)
            yield self.norm(feature)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Draft-vocabulary logits [..., Vd] of normed hidden states [..., H]."""
        return self.lm_head(hidden)


KeyValues = list[tuple[torch.Tensor, torch.Tensor]]  # (keys, values) of each step so far, [B, nkv, S, d] each


class DraftLayer(nn.Module):
    """A Llama layer whose attention reads cat(embedding, feature), each normed on its own."""

    def __init__(self, shape: DrafterShape):
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.hidden_norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = DraftAttention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = DraftMLP(shape)

    def forward(self, embedding, feature, angles: torch.Tensor, cache: KeyValues) -> torch.Tensor:
        """Map embedding and feature, [B, S, H] each, to [B, S, H]; append this step's keys and values to `cache`."""
        joined = torch.cat([self.input_layernorm(embedding), self.hidden_norm(feature)], -1)
        attended = feature + self.self_attn(joined, angles, cache)
        return attended + self.mlp(self.post_attention_layernorm(attended))


class DraftAttention(nn.Module):
    """Grouped-query attention over the keys of all steps so far."""

    def __init__(self, shape: DrafterShape):
        super().__init__()
        self.head_dim = shape.head_dim
        query, key = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        self.q_proj = Projection(2 * shape.hidden_size, query)
        self.k_proj = Projection(2 * shape.hidden_size, key)
        self.v_proj = Projection(2 * shape.hidden_size, key)
        self.o_proj = Projection(query, shape.hidden_size)

    def forward(self, x: torch.Tensor, angles: torch.Tensor, cache: KeyValues) -> torch.Tensor:
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        cache.append((rotate(key, angles), value))
        attended = unrolled_attention(rotate(query, angles), cache)
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class DraftMLP(nn.Module):
    def __init__(self, shape: DrafterShape):
        super().__init__()
        self.gate_proj = Projection(shape.hidden_size, shape.intermediate_size)
        self.up_proj = Projection(shape.hidden_size, shape.intermediate_size)
        self.down_proj = Projection(shape.intermediate_size, shape.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def unrolled_attention(query: torch.Tensor, cache: KeyValues, block: int = QUERY_BLOCK) -> torch.Tensor:
    """Attention of the latest step: softmax over step 0's keys up to the query, and later steps' keys at the query.

    Args:
        query: [B, nh, S, d].
        cache: keys and values of each step, the latest included, [B, nkv, S, d] each.
        block: queries whose scores are in memory at one time. With several blocks the backward pass recomputes them.

    Returns [B, nh, S, d].
    """
    length = query.shape[2]
    blocks = []
    for first in range(0, length, block):
        last = min(first + block, length)
        causal = tuple(x[:, :, :last] for x in cache[0])
        diagonal = [(key[:, :, first:last], value[:, :, first:last]) for key, value in cache[1:]]
        arguments = (query[:, :, first:last], causal, diagonal)
        if torch.is_grad_enabled() and length > block:
            options = {"use_reentrant": False, "preserve_rng_state": False}  # attention draws no random numbers
            blocks.append(checkpoint(_attend, *arguments, **options))
        else:
            blocks.append(_attend(*arguments))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 2)


def _attend(query: torch.Tensor, causal: tuple[torch.Tensor, torch.Tensor], diagonal: KeyValues) -> torch.Tensor:
    """Attention of queries [B, nh, Q, d] at the last Q of T positions; `causal` [B, nkv, T, d], `diagonal` Q wide."""
    key, value = causal
    width, total = query.shape[2], key.shape[2]
    # Query heads that share a key head become rows of one matrix product, so that keys are not copied.
    grouped = query.unflatten(1, (key.shape[1], -1)) / math.sqrt(query.shape[-1])  # [B, nkv, group, Q, d]
    scores = (grouped.flatten(2, 3) @ key.transpose(-1, -2)).unflatten(2, (-1, width))  # [B, nkv, group, Q, T]
    future = torch.ones(width, total, dtype=torch.bool, device=query.device).triu(total - width + 1)
    own = [(grouped * k.unsqueeze(2)).sum(-1, keepdim=True) for k, _ in diagonal]
    scores = torch.cat([scores.masked_fill(future, -torch.inf), *own], -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    attended = (weights[..., :total].flatten(2, 3) @ value).unflatten(2, (-1, width))
    for index, (_, v) in enumerate(diagonal, start=total):
        attended = attended + weights[..., index, None] * v.unsqueeze(2)
    return attended.flatten(1, 2)


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Apply RoPE to [B, n, S, d] by `angles` [S, d / 2], pairing entry i with i + d / 2, in float32."""
    cos, sin = angles.cos(), angles.sin()
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def shift_left(x: torch.Tensor, by: int) -> torch.Tensor:
    """Shift `x` along dimension 1: entry t of the result is entry t + by of `x`, zero past the end."""
    shifted = torch.zeros_like(x)
    kept = max(x.shape[1] - by, 0)
    shifted[:, :kept] = x[:, by:]
    return shifted


class Projection(nn.Linear):
    """A linear map without a bias. Its weight is undefined until the drafter initializes or loads it."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Do nothing: torch's own initialization would draw from the global generator."""
