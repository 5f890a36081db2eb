"""Count the traffic of a step: the push of both models, and the collectives of training.

Volumes are the bytes that one GPU receives in one step. In a ring over n ranks, all-gather and reduce-scatter of N
bytes receive N (n - 1) / n each, and all-reduce both (Patarasuk and Yuan 2009). A time is a volume divided by the rate
of its link; latencies and other traffic on the same link are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.scale.hardware import Hardware

WIDTH = 2  # bytes of bf16: weights, and gradients as DeepSpeed sends them for a bf16 model


@dataclass(frozen=True)
class Layout:
    """A layout: `tp` x `dp` ranks train; engines of `engine_tp` ranks share their GPUs, or have GPUs of their own."""

    tp: int
    dp: int
    zero: int
    engine_tp: int
    colocated: bool = True


@dataclass(frozen=True)
class Volumes:
    """Bytes that one GPU receives from GPUs of its host (`within`), over the network (`across`), or copies itself."""

    within: float = 0.0
    across: float = 0.0
    local: float = 0.0

    def __add__(self, other: Volumes) -> Volumes:
        return Volumes(self.within + other.within, self.across + other.across, self.local + other.local)

    def times(self, count: float) -> Volumes:
        return Volumes(self.within * count, self.across * count, self.local * count)

    def seconds(self, gpu: Hardware) -> float:
        """Return the seconds of all transfers one after the other, as the collectives of one stream run."""
        return self.within / gpu.within + self.across / gpu.across + self.local / gpu.bandwidth


@dataclass(frozen=True)
class Push:
    """One push. `collected` is the traffic of the rank that gathers most, `delivered` that of one rank of an engine.

    Buckets are gathered while others are delivered, so the longer of the two counts.
    """

    collected: Volumes
    delivered: Volumes

    def seconds(self, gpu: Hardware) -> float:
        return max(self.collected.seconds(gpu), self.delivered.seconds(gpu))


def push(actor: int, drafter: int, layout: Layout, gpu: Hardware) -> Push:
    """Count the traffic of a push of models with `actor` and `drafter` parameters.

    The rank that feeds an engine gathers the actor from its tensor-parallel group; under ZeRO-3 every rank first
    gathers its own shards from the data-parallel group. Colocated engines read their part from that rank's memory
    through handles. Other engines receive both models whole in one broadcast. On both sides a model is copied once,
    into the bucket or out of it, and read once for its digest.
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
    """Count ZeRO's traffic of a step with one optimizer update.

    Args:
        passes: a rank's micro-batches of training, each with a forward pass, a recomputation and a backward pass.
        scored: a rank's micro-batches that are only scored.

    Stage 1 reduces gradients once and gathers weights once. Stages 2 and 3 reduce gradients after every micro-batch.
    Stage 3 gathers weights for every forward and every backward pass; recomputation uses those of the backward pass.
    """
    one = ring(WIDTH * actor / layout.tp, layout.dp)
    rounds = {1: 2 + 1, 2: passes + 1, 3: 3 * passes + scored}[layout.zero]
    return over_copies(one, layout, gpu).times(rounds)


def tensor_parallel(hf_config, layout: Layout, passes_tokens: float, scored_tokens: float) -> Volumes:
    """Count the all-reduces of activations: per layer two forward, two backward, two for recomputation.

    Args:
        passes_tokens: tokens of one rank's training passes.
        scored_tokens: tokens of one rank's scoring passes.
    """
    one = 2 * ring(WIDTH * hf_config.hidden_size, layout.tp) * hf_config.num_hidden_layers
    return Volumes(within=one * (6 * passes_tokens + 2 * scored_tokens))


def ring(size: float, ranks: int) -> float:
    """Return the bytes that a rank receives in an all-gather or a reduce-scatter of `size` bytes over `ranks`."""
    return size * (ranks - 1) / ranks


def over_copies(volume: float, layout: Layout, gpu: Hardware) -> Volumes:
    """Return the volume of a data-parallel collective: over the network if its ranks are on several hosts."""
    return Volumes(within=volume) if layout.tp * layout.dp <= gpu.gpus_per_host else Volumes(across=volume)
