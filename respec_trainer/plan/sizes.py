"""Compute the sizes of models from their Hugging Face config: parameters, activations and key/value cache, in bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from respec_trainer.drafter.shape import DrafterShape
from respec_trainer.models.rules import head_dim, padded_vocab_size
from respec_trainer.weights.hf_map import hf_model_shapes, megatron_shapes

FLOAT = 4  # bytes of float32
DRAFT_VOCABULARY = 32000  # size in published EAGLE-3 drafters; the default if there is no drafter to read it from


@dataclass(frozen=True)
class ActorSizes:
    """Sizes of the actor with config `hf` on one of `tp` ranks, with `width` bytes per number."""

    hf: object
    tp: int
    width: int

    @property
    def parameters(self) -> int:
        """Count of the numbers in one rank's shards."""
        return sum(math.prod(shape) for shape in megatron_shapes(self.hf, self.tp).values())

    def layer_activations(self, sequence_parallel: bool) -> int:
        """Return the bytes per token that one layer of `actor/layers.py` keeps for its backward pass.

        With H hidden, A = heads x head_dim, K = both of keys and values, F the MLP's width, b bytes a number:

            two norms     2 (4 + 2 b) H   the float32 input, what the weight scales, and what the matrices read
            attention     b (4 A + 1.5 K) projections, rotated queries and keys, output before and after its transpose
            MLP           4 b F           gate and up, their silu, their product

        Every rank keeps the norms' whole part, or 1 / tp of it with sequence parallelism. The rest is divided by tp.
        """
        hf, b = self.hf, self.width
        attention = hf.num_attention_heads * head_dim(hf)
        keys = 2 * max(hf.num_key_value_heads, self.tp) * head_dim(hf)
        norms = 2 * (4 + 2 * b) * hf.hidden_size // (self.tp if sequence_parallel else 1)
        return norms + int(b * (4 * attention + 1.5 * keys + 4 * hf.intermediate_size)) // self.tp

    def activations(self, tokens: int, recompute: bool, sequence_parallel: bool) -> int:
        """Return the bytes that one forward pass over `tokens` keeps.

        With `recompute` every layer keeps its input, and one layer at a time keeps what its backward pass needs. Also
        counted are the final norm, the embedded tokens and the hidden states that are scored.
        """
        hf, b = self.hf, self.width
        layer, inputs = self.layer_activations(sequence_parallel), b * hf.hidden_size
        layers = hf.num_hidden_layers * inputs + layer if recompute else hf.num_hidden_layers * layer
        return tokens * (layers + (4 + 2 * b) * hf.hidden_size + 2 * inputs)

    def logits(self, chunk: int, truncates: bool = False) -> int:
        """Return the bytes needed to score one chunk of `chunk` tokens.

        These are the logits and their gradient, three float32 tables of the same shape (five, and two masks, if top_k
        or top_p are searched for what they keep), and the output layer's gradient from the chunk before it is added to
        the sum.
        """
        rows = padded_vocab_size(self.hf, self.tp) // self.tp
        tables = (5 * FLOAT + 2) if truncates else 3 * FLOAT
        return chunk * rows * (2 * self.width + tables) + rows * self.hf.hidden_size * self.width

    def largest_parameter(self) -> int:
        return max(math.prod(shape) for shape in megatron_shapes(self.hf, self.tp).values())


def model_parameters(hf) -> int:
    """Return the count of the numbers of the whole model; a tied embedding counts once."""
    return sum(math.prod(shape) for shape in hf_model_shapes(hf).values())


def cache_bytes(hf, tp: int, width: int) -> int:
    """Return the bytes of one token's keys and values on one of an engine's `tp` ranks; heads are not split."""
    return 2 * hf.num_hidden_layers * max(1, hf.num_key_value_heads // tp) * head_dim(hf) * width


@dataclass(frozen=True)
class DrafterSizes:
    """Sizes of an EAGLE-3 drafter: its matrices, output layer and norms."""

    shape: DrafterShape

    @property
    def output_layer(self) -> int:
        return self.shape.draft_vocab_size * self.shape.hidden_size

    @property
    def parameters(self) -> int:
        shape = self.shape
        hidden, head = shape.hidden_size, shape.head_dim
        queries, keys = shape.num_attention_heads * head, shape.num_key_value_heads * head
        attention = 2 * hidden * (queries + 2 * keys) + queries * hidden
        matrices = 3 * hidden * hidden + attention + 3 * hidden * shape.intermediate_size
        return matrices + self.output_layer + 4 * hidden

    def learning(self, muon: bool, compare_frozen: bool) -> int:
        """Return the bytes of the Online Learner's models.

        These are float32 weights, gradients, the served copy, with `compare_frozen` the initial weights, and moments:
        two of AdamW for each number, but one of Muon for all matrices except the output layer.
        """
        moments = self.parameters + (self.output_layer if muon else self.parameters)
        return FLOAT * (self.parameters * (4 if compare_frozen else 3) + moments)

    def activations(self, tokens: int, unroll: int) -> int:
        """Return the bytes that `tokens` of a micro-batch keep over `unroll` draft steps under bf16 autocast.

        Each step, with H, A, K and F as for the actor: float32 norms with their outputs and casts, 50 H; attention,
        recomputed, 6 A + 2 K; the MLP 8 F. Once: features and embeddings, 20 H, and the teacher's bf16 logits before
        and after the temperature.
        """
        shape = self.shape
        attention, keys = shape.num_attention_heads * shape.head_dim, 2 * shape.num_key_value_heads * shape.head_dim
        step = 50 * shape.hidden_size + 6 * attention + 2 * keys + 8 * shape.intermediate_size
        return tokens * (unroll * step + 20 * shape.hidden_size + 2 * 2 * shape.draft_vocab_size)

    def row(self, tokens: int, width: int) -> int:
        """Return the bytes of a response of `tokens`, with its prompt, in the replay buffer: features, states, ids."""
        return tokens * (4 * self.shape.hidden_size * width + 12)

    def snapshot(self, tokens: int, width: int) -> int:
        """Return the bytes of the vocabulary's rows in the buffer, shared by a step's responses of `tokens` in all."""
        rows = self.shape.draft_vocab_size + min(tokens, self.shape.vocab_size)
        return rows * self.shape.hidden_size * width
