"""Actors of tiny models on ranks, the batch that they train on, and the weights and states that result."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from respec_trainer.rollout.batch import Batch
from tests.support.models import tiny_run_config

STEPS = 2
OPTIM = {
    "actor.optim.lr": 1e-2,
    "actor.optim.warmup_steps": 2,  # so that the two updates have different learning rates
    "actor.optim.weight_decay": 0.1,
    "actor.optim.clip": 0.5,  # below the first gradient norm, so that clipping is part of the comparison
    # With the default of 1e-8, Adam divides gradients that are only rounding noise by their own size. Then weights
    # differ by 1e-4 between any two orders of summation, even within one process.
    "actor.optim.eps": 1e-3,
}


def make_batch(vocab_size: int) -> tuple[Batch, torch.Tensor]:
    """Return eight rows of different lengths with sampler log-probs, and their advantages."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.tensor([16, 7, 12, 9, 14, 5, 11, 16])
    position = torch.arange(16)
    mask = (position >= torch.tensor([4, 3, 6, 5, 2, 1, 4, 8])[:, None]) & (position < lengths[:, None])
    tokens = torch.randint(1, vocab_size, (8, 16), generator=generator) * (position < lengths[:, None])
    sampler = -5.0 + torch.randn(8, 16, generator=generator)
    advantages = torch.randn(8, generator=generator)
    # No bonus token in the first four rows: on two data-parallel ranks, and in two minibatches, the first has none.
    origins = torch.arange(8 * 16).view(8, 16) % torch.tensor([2] * 4 + [3] * 4)[:, None]
    return Batch(tokens, mask, lengths, sampler * mask, (origins * mask).to(torch.int8)), advantages


def build_actor(folder: Path, changes: dict):
    from respec_trainer.actor.engine import Actor
    from respec_trainer.actor.parallel import init_parallel

    config = tiny_run_config(folder, OPTIM | changes)
    return Actor(config, init_parallel(config), total_updates=STEPS)


def rebuild_actor(actor, changes: dict):
    """Make another actor of the same topology: the process groups stay."""
    from respec_trainer.actor.engine import Actor

    config = tiny_run_config(actor.config.model.path, OPTIM | changes)
    return Actor(config, actor.topology, total_updates=STEPS)


def my_rows(actor, batch: Batch) -> slice:
    share = len(batch) // actor.topology.dp
    return slice(actor.topology.dp_rank * share, (actor.topology.dp_rank + 1) * share)


def hf_weights(actor) -> dict[str, torch.Tensor]:
    """Return the Hugging Face weights on every rank. Raises AssertionError if ranks with the same weights differ."""
    import deepspeed

    from respec_trainer.weights.hf_map import to_hf

    topology, weights = actor.topology, {}
    for name, parameter in actor.engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=actor.engine.zero_optimization_stage() == 3):
            mine = parameter.detach().clone()
        everyone = [torch.empty_like(mine) for _ in range(topology.world_size)]
        dist.all_gather(everyone, mine)
        sharded = getattr(parameter, "tensor_model_parallel", False)
        for rank, theirs in enumerate(everyone):
            same = everyone[rank % topology.tp if sharded else 0]
            assert torch.equal(theirs, same), f"{name} differs between ranks that should hold the same"
        weights |= dict(to_hf(name, everyone[: topology.tp if sharded else 1], actor.hf_config))
    return weights


def optimizer_state(actor) -> list[torch.Tensor]:
    states = actor.engine.optimizer.optimizer.state.values()
    return [value.clone() for state in states for value in state.values() if torch.is_tensor(value)]


def variant(tp: int, stage: int, micro: int, **more) -> dict:
    return {"actor.parallel.tp": tp, "actor.zero.stage": stage, "actor.micro_batch_size": micro} | more


def train(folder: Path, variants: list[dict]) -> list[dict]:
    """Train with each variant of the configuration; return this rank's inference, metrics and final weights."""
    from respec_trainer.actor.parallel import shutdown_parallel

    results, actor = [], None
    for changes in variants:
        actor = rebuild_actor(actor, changes) if actor else build_actor(folder, changes)
        batch, advantages = make_batch(actor.hf_config.vocab_size)
        rows = my_rows(actor, batch)
        old = actor.infer(batch.rows(rows))
        calls = STEPS // actor.config.objective.minibatches
        stats = [actor.update(batch.rows(rows), old.logprobs, advantages[rows]) for _ in range(calls)]
        states = actor.engine.optimizer.optimizer.state.values()
        results.append(
            {
                "rows": rows,
                "old": old.logprobs,
                "entropy": old.entropy,
                "stats": stats,
                "weights": hf_weights(actor),
                "counts": {actor.updates, *(int(state["step"]) for state in states)},
            }
        )
        actor.engine.destroy()
    shutdown_parallel()
    return results
