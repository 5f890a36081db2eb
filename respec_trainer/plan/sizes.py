"""What models take, from their Hugging Face config alone: parameters, activations and key/value cache, in bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from respec_trainer.drafter.shape import DrafterShape
from respec_trainer.models.rules import head_dim, padded_vocab_size
from respec_trainer.weights.hf_map import hf_model_shapes, megatron_shapes

FLOAT = 4  # bytes of float32
DRAFT_VOCABULARY = 32000  # as published EAGLE-3 drafters have it; taken where no drafter is there to be asked


@dataclass(frozen=True)
class ActorSizes:
    """Of the actor with config `hf`, on one of `tp` ranks, its numbers in `width` bytes."""

    hf: object
    tp: int
    width: int

    @property
    def parameters(self) -> int:
        """Numbers that one rank's shards hold."""
        return sum(math.prod(shape) for shape in megatron_shapes(self.hf, self.tp).values())

    def layer_activations(self, sequence_parallel: bool) -> int:
        """Bytes a token that one layer keeps for its backward pass, as `actor/layers.py` computes it.

        With H hidden, A = heads x head_dim, K = both of keys and values, F the MLP's width, b bytes a number:

            two norms     2 (4 + 2 b) H   the float32 input, what the weight scales, and what the matrices read
            attention     b (4 A + 1.5 K) projections, rotated queries and keys, output before and after its transpose
            MLP           4 b F           gate and up, their silu, their product

        The norms' share is whole on every rank but under sequence parallelism, the rest is cut by tp.
        """
        hf, b = self.hf, self.width
        attention = hf.num_attention_heads * head_dim(hf)
        keys = 2 * max(hf.num_key_value_heads, self.tp) * head_dim(hf)
        norms = 2 * (4 + 2 * b) * hf.hidden_size // (self.tp if sequence_parallel else 1)
        return norms + int(b * (4 * attention + 1.5 * keys + 4 * hf.intermediate_size)) // self.tp

    def activations(self, tokens: int, recompute: bool, sequence_parallel: bool) -> int:
        """Bytes that `tokens` of one forward pass keep.

        With `recompute` every layer keeps its input, and one layer at a time what its backward pass needs. Besides,
        the final norm, and the embedded tokens beside the hidden states that are scored.
        """
        hf, b = self.hf, self.width
        layer, inputs = self.layer_activations(sequence_parallel), b * hf.hidden_size
        layers = hf.num_hidden_layers * inputs + layer if recompute else hf.num_hidden_layers * layer
        return tokens * (layers + (4 + 2 * b) * hf.hidden_size + 2 * inputs)

    def logits(self, chunk: int) -> int:
        """Bytes while one chunk of `chunk` tokens is scored: logits and their gradient, three float32 tables as
        large, and the output layer's gradient of the chunk before it is added."""
        rows = padded_vocab_size(self.hf, self.tp) // self.tp
        return chunk * rows * (2 * self.width + 3 * FLOAT) + rows * self.hf.hidden_size * self.width

    def largest_parameter(self) -> int:
        return max(math.prod(shape) for shape in megatron_shapes(self.hf, self.tp).values())


def model_parameters(hf) -> int:
    """Numbers of the whole model, a tied embedding once."""
    return sum(math.prod(shape) for shape in hf_model_shapes(hf).values())


def cache_bytes(hf, tp: int, width: int) -> int:
    """Bytes of keys and values of one token on one of an engine's `tp` ranks; a head is never cut."""
    return 2 * hf.num_hidden_layers * max(1, hf.num_key_value_heads // tp) * head_dim(hf) * width


@dataclass(frozen=True)
class DrafterSizes:
    """Of an EAGLE-3 drafter: its matrices between the layers, its output layer and norms."""

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
        """Bytes of the Online Learner's models: float32 weights, gradients, the served copy and, where it is
        measured, the first one, and moments: two of AdamW, one of Muon for all matrices but the output layer."""
        moments = self.parameters + (self.output_layer if muon else self.parameters)
        return FLOAT * (self.parameters * (4 if compare_frozen else 3) + moments)

    def activations(self, tokens: int, unroll: int) -> int:
        """Bytes that `tokens` of a micro-batch keep over `unroll` draft steps under bf16 autocast.

        Each step, with H, A, K and F as of the actor: norms in float32 with what they give and its casts, 50 H;
        attention, recomputed, 6 A + 2 K; the MLP 8 F. Once: features and embeddings, 20 H, and the teacher's bf16
        logits before and after the temperature.
        """
        shape = self.shape
        attention, keys = shape.num_attention_heads * shape.head_dim, 2 * shape.num_key_value_heads * shape.head_dim
        step = 50 * shape.hidden_size + 6 * attention + 2 * keys + 8 * shape.intermediate_size
        return tokens * (unroll * step + 20 * shape.hidden_size + 2 * 2 * shape.draft_vocab_size)

    def row(self, tokens: int, width: int) -> int:
        """Bytes of a response of `tokens`, prompt included, in the replay buffer: features, hidden states, numbers."""
        return tokens * (4 * self.shape.hidden_size * width + 12)

    def snapshot(self, tokens: int, width: int) -> int:
        """Bytes of the vocabulary's rows that a step's responses share, `tokens` of them in all, in the buffer."""
        rows = self.shape.draft_vocab_size + min(tokens, self.shape.vocab_size)
        return rows * self.shape.hidden_size * width
