"""What a step sends over links: the push of both models, and what training says between ranks.

Volumes are of one GPU, received, in one step. Of a collective over n ranks in a ring: of N bytes, all-gather and
reduce-scatter N (n - 1) / n each, all-reduce both (Patarasuk and Yuan 2009). Times are volumes over the links that they
take; latencies, and what runs at the same time on the same link, are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.scale.hardware import Hardware

WIDTH = 2  # bytes of bf16: weights, and gradients as DeepSpeed sends them for a bf16 model


@dataclass(frozen=True)
class Layout:
    """Who holds what: `tp` x `dp` ranks train; engines of `engine_tp` share their GPUs, or have others."""

    tp: int
    dp: int
    zero: int
    engine_tp: int
    colocated: bool = True


@dataclass(frozen=True)
class Volumes:
    """Bytes that one GPU receives from its host's other GPUs and over the network; `local`: of its own memory."""

    within: float = 0.0
    across: float = 0.0
    local: float = 0.0

    def __add__(self, other: Volumes) -> Volumes:
        return Volumes(self.within + other.within, self.across + other.across, self.local + other.local)

    def times(self, count: float) -> Volumes:
        return Volumes(self.within * count, self.across * count, self.local * count)

    def seconds(self, gpu: Hardware) -> float:
        """One after the other, as the collectives of one stream run."""
        return self.within / gpu.within + self.across / gpu.across + self.local / gpu.bandwidth


@dataclass(frozen=True)
class Push:
    """One push. `collected` comes together on the rank that receives most; `delivered` reaches one rank of an engine.

    Buckets are collected while others are delivered, so the longer of the two counts.
    """

    collected: Volumes
    delivered: Volumes

    def seconds(self, gpu: Hardware) -> float:
        return max(self.collected.seconds(gpu), self.delivered.seconds(gpu))


def push(actor: int, drafter: int, layout: Layout, gpu: Hardware) -> Push:
    """A push of models of so many parameters.

    The rank that feeds an engine gathers the actor from its tensor-parallel group; under ZeRO-3 every rank first
    gathers its own shards from the data-parallel group. Colocated engines read their part out of that rank's memory,
    handle by handle; others get all of both models by one broadcast, which takes as long as the bytes take to pass.
    On both sides a model is copied once, into the bucket and out of it, and read once for its digest.
    """
    whole, each = WIDTH * actor, WIDTH * (actor + drafter)
    collected = Volumes(within=ring(whole, layout.tp), local=3 * each)
    if layout.zero == 3:
        collected += over_copies(ring(whole / layout.tp, layout.dp), layout, gpu)
    mine = each / layout.engine_tp
    if layout.colocated:
        return Push(collected, Volumes(within=mine if layout.engine_tp > 1 else 0.0, local=3 * mine))
    return Push(collected, Volumes(across=each, local=3 * mine))


def update(actor: int, layout: Layout, gpu: Hardware, passes: int, scored: int) -> Volumes:
    """ZeRO's traffic of a step of one optimizer update.

    Args:
        passes: micro-batches of a rank that are trained on, forward, recomputation and backward. scored: those that are
            only scored.

    Stage 1 reduces gradients once and gathers weights once; stages 2 and 3 reduce them after every micro-batch; stage 3
    gathers weights for every forward and every backward pass, in which recomputation finds them.
    """
    one = ring(WIDTH * actor / layout.tp, layout.dp)
    rounds = {1: 2 + 1, 2: passes + 1, 3: 3 * passes + scored}[layout.zero]
    return over_copies(one, layout, gpu).times(rounds)


def tensor_parallel(hf_config, layout: Layout, passes_tokens: float, scored_tokens: float) -> Volumes:
    """All-reduces of activations: two a layer forward, two backward, two when recomputed. Tokens are one rank's."""
    one = 2 * ring(WIDTH * hf_config.hidden_size, layout.tp) * hf_config.num_hidden_layers
    return Volumes(within=one * (6 * passes_tokens + 2 * scored_tokens))


def ring(size: float, ranks: int) -> float:
    """Bytes that a rank receives where `size` bytes are gathered from, or reduced and scattered over, `ranks`."""
    return size * (ranks - 1) / ranks


def over_copies(volume: float, layout: Layout, gpu: Hardware) -> Volumes:
    """Of a data-parallel collective: over the network where its ranks are on several hosts."""
    return Volumes(within=volume) if layout.tp * layout.dp <= gpu.gpus_per_host else Volumes(across=volume)
