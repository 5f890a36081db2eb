"""A loss or gradient that is not finite on one rank: no rank steps, all raise, and training continues unchanged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from respec_trainer.config import ObjectiveConfig
from respec_trainer.objective.grpo import GRPO
from respec_trainer.objective.inputs import LossInputs
from respec_trainer.objective.registry import RunObjective
from tests.support.actors import build_actor, hf_weights, make_batch, my_rows, optimizer_state, rebuild_actor, variant
from tests.support.models import save_tiny_model, tiny_config
from tests.support.processes.ranks import run_ranks


def nan_advantage(actor, batch, advantages) -> None:
    """A bad value on the last data-parallel rank only."""
    if actor.topology.dp_rank == actor.topology.dp - 1:
        advantages[-1] = float("nan")


def infinite_gradient_of_a_shard(actor, batch, advantages):
    """A bad gradient on the last rank only, in a weight cut over tensor parallelism."""
    return hook(actor, "decoder.layers.0.mlp.linear_fc1.weight", float("inf"))


def nan_gradient_of_a_replica(actor, batch, advantages):
    """A bad gradient on the last rank only, in a replicated weight: DeepSpeed's norm only counts rank 0's copy."""
    return hook(actor, "decoder.layers.1.pre_mlp_layernorm.weight", float("nan"))


def infinite_loss_with_a_finite_gradient(actor, batch, advantages):
    """A mismatch between sampler and actor that is infinite without truncation, and has no gradient."""
    whole = actor.objective

    def poisoned(inputs: LossInputs, config: ObjectiveConfig):
        loss, metrics = whole.loss(inputs)
        last = actor.topology.rank == actor.topology.world_size - 1
        return loss + (float("inf") if last else 0.0), metrics

    actor.objective = RunObjective(replace(GRPO, loss=poisoned), actor.config.objective)
    return lambda: setattr(actor, "objective", whole)


def hook(actor, name: str, value: float):
    def poison(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[0] = value
        return gradient

    if actor.topology.rank == actor.topology.world_size - 1:
        return dict(actor.engine.module.named_parameters())[name].register_hook(poison).remove
    return None


POISONS = (
    nan_advantage,
    infinite_gradient_of_a_shard,
    nan_gradient_of_a_replica,
    infinite_loss_with_a_finite_gradient,
)


def refuse_and_go_on(folder: Path, variants: list[dict], poisons: list) -> list[dict]:
    """Do a good update, one with each of `poisons`, and a good one; return what was equal around the bad ones."""
    from respec_trainer.actor.engine import NonFiniteStep
    from respec_trainer.actor.parallel import shutdown_parallel

    results, actor = [], None
    for changes in variants:
        actor = rebuild_actor(actor, changes) if actor else build_actor(folder, changes)
        batch, advantages = make_batch(actor.hf_config.vocab_size)
        rows = my_rows(actor, batch)
        batch, advantages = batch.rows(rows), advantages[rows]
        old = actor.infer(batch).logprobs
        actor.update(batch, old, advantages)
        before = hf_weights(actor), optimizer_state(actor), actor.updates, actor.engine.get_lr()
        messages = []
        for poison in poisons:
            poisoned = advantages.clone()
            undo = poison(actor, batch, poisoned)
            with pytest.raises(NonFiniteStep) as raised:
                actor.update(batch, old, poisoned)
            messages.append(str(raised.value))
            if undo:
                undo()
        after = hf_weights(actor), optimizer_state(actor), actor.updates, actor.engine.get_lr()
        stats = actor.update(batch, old, advantages)
        results.append(
            {
                "weights kept": all(torch.equal(before[0][name], after[0][name]) for name in before[0]),
                "state kept": len(before[1]) > 0 and all(map(torch.equal, before[1], after[1])),
                "counts kept": before[2:] == after[2:] == (1, before[3]),
                "messages": messages,
                "weights": hf_weights(actor),
                "grad_norm": stats["policy/grad_norm"],
            }
        )
        actor.engine.destroy()
    shutdown_parallel()
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("llama"), tiny_config("llama"))


# (ranks, tensor parallelism) -> (ZeRO stage, dtype): every stage in both, with tensors cut and with copies, and
# where there are both, the optimizers that differ most.
KINDS = {
    (2, 2): [(1, "fp32"), (2, "bf16"), (3, "fp32")],
    (2, 1): [(1, "bf16"), (2, "fp32"), (3, "bf16")],
    (4, 2): [(1, "bf16"), (3, "fp32")],
}


@pytest.mark.parametrize(("world_size", "tp"), KINDS)
def test_a_refused_step_changes_nothing_on_any_rank(folder, world_size, tp):
    kinds = KINDS[world_size, tp]
    variants = [variant(tp, stage, 3, **{"model.dtype": dtype}) for stage, dtype in kinds]
    refused = run_ranks(world_size, refuse_and_go_on, folder, variants, list(POISONS))
    untroubled = run_ranks(world_size, refuse_and_go_on, folder, variants, [])
    for rank in range(world_size):
        for kind, result, clean in zip(kinds, refused[rank], untroubled[rank], strict=True):
            where = f"rank {rank}, ZeRO-{kind[0]} {kind[1]}"
            for what in ("weights kept", "state kept", "counts kept"):
                assert result[what], f"{where}: {what} is not so"
            assert all("minibatch 1 of 1" in message for message in result["messages"])
            assert len(result["messages"]) == len(POISONS)
            assert result["grad_norm"] == clean["grad_norm"], f"{where}: something of a refused gradient was left"
            for name, weight in result["weights"].items():
                assert torch.equal(weight, clean["weights"][name]), f"{where}: {name} differs after going on"
