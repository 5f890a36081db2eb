"""Estimate the cost of decoding on a GPU that was not measured: a CostModel from shapes and data sheets.

A pass reads all weights once and the cached keys and values of every sequence, and computes for every token that it
processes; the longer of the two counts (the roofline model, Williams, Waterman and Patterson 2009). If a profile can be
measured, prefer it: this estimate does not model kernels.
"""

from __future__ import annotations

from benchmarks.scale.hardware import Hardware
from respec_trainer.models.rules import head_dim
from respec_trainer.plan.sizes import ActorSizes, DrafterSizes, cache_bytes
from respec_trainer.speculation.cost import CostModel, Piece, Terms

WIDTH = 2  # bytes of bf16
OVERLAP = 8.0  # reading and computing overlap nearly completely


def roofline(hf_config, drafter: DrafterSizes, tp: int, gpu: Hardware) -> CostModel:
    """Return the costs of an engine of `tp` GPUs of one host in bf16; its EAGLE-3 drafter is split over the ranks.

    With P weights, L layers and A = heads x head_dim of one rank: a pass reads 2 P bytes, computes 2 P operations per
    token and 4 L A per (query, key) pair, and needs two all-reduces per layer. The drafter is one layer and its head.
    """
    layers, attention = hf_config.num_hidden_layers, hf_config.num_attention_heads * head_dim(hf_config)
    target = _pass(ActorSizes(hf_config, tp, WIDTH).parameters, layers, attention / tp, gpu, tp)
    target["kv"] = cache_bytes(hf_config, tp, WIDTH) / gpu.bandwidth
    draft = _pass(drafter.parameters / tp, 1, attention / tp, gpu, tp)
    draft["kv"] = target["kv"] / layers
    reads = {"weights": 0.0, "kv": 0.0, "overlap": 1.0}  # reading a long prompt is bound by computing
    own = gpu.launch / 10  # fixed time of a drafter's pass: the whole cycle is scheduled once
    pieces: dict[Piece, Terms] = {
        "plain": Terms(fixed=gpu.launch, **target),
        "verify": Terms(fixed=gpu.launch, **target),
        "draft": Terms(fixed=own, **draft),
        "extend": Terms(fixed=own, **draft),
        "catch_up": Terms(fixed=own, **(draft | reads)),
        "prefill": Terms(fixed=gpu.launch, **(target | reads)),
    }
    return CostModel(pieces)


def _pass(parameters: float, layers: int, attention: float, gpu: Hardware, tp: int) -> dict[str, float]:
    """Terms of one pass of one rank, without its cache. "weights" includes the time of the pass's all-reduces."""
    hops = 2 * layers * gpu.hop if tp > 1 else 0.0
    return {
        "weights": WIDTH * parameters / gpu.bandwidth + hops,
        "token": 2 * parameters / gpu.flops,
        "pair": 4 * layers * attention / gpu.flops,
        "overlap": OVERLAP,
    }
