"""actor/offload.py: all tensors come back bit for bit, for every ZeRO stage; here from CPU to CPU."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path

import pytest
import torch

from tests.support.actors import build_actor, hf_weights, make_batch, my_rows, optimizer_state, rebuild_actor, variant
from tests.support.models import save_tiny_model, tiny_config
from tests.support.processes.ranks import run_ranks

# (ZeRO stage, dtype); the stages differ in what data parallelism divides, so no test needs tensor parallelism.
KINDS = {1: [(1, "bf16"), (2, "fp32"), (3, "bf16")], 2: [(1, "fp32")]}


def live_bytes() -> int:
    """Return the bytes of all tensors that this process can reach."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def hand_over(actor, batch) -> dict:
    """Move everything out in order and back; return the observations."""
    from respec_trainer.actor.offload import Offload

    offload = Offload(actor.engine, moves=True)
    before, scores = [*hf_weights(actor).values(), *optimizer_state(actor)], actor.infer(batch).logprobs
    sizes = [live_bytes()]
    for part in ("optimizer", "optimizer", "weights"):
        if part == "weights":
            seen = {"scores": torch.equal(scores, actor.infer(batch).logprobs)}
            with pytest.raises(RuntimeError, match="actor's optimizer is off"):
                actor.update(batch, scores, torch.ones(len(batch)))
        offload.out(part)
        sizes.append(live_bytes() - held(offload))
    with pytest.raises(RuntimeError, match="actor's optimizer is off|actor's weights is off"):
        actor.infer(batch)
    with pytest.raises(RuntimeError, match="optimizer cannot go back before its weights"):
        offload.back("optimizer")
    for part in ("weights", "optimizer", "optimizer"):
        offload.back(part)
    with pytest.raises(RuntimeError, match="weights cannot go out after its optimizer"):
        offload.out("weights")
    after = [*hf_weights(actor).values(), *optimizer_state(actor)]
    seen["same"] = len(before) == len(after) and all(map(torch.equal, before, after))
    host = [piece.data_ptr() for pieces in offload.spare.values() for piece in pieces]
    for part in ("optimizer", "weights"):
        offload.out(part)
    again = [piece.data_ptr() for pieces in offload.pieces_away().values() for piece in pieces]
    for part in ("weights", "optimizer"):
        offload.back(part)
    return seen | {"sizes": sizes, "host kept": sorted(again) == sorted(host)}


def held(offload) -> int:
    return sum(piece.numel() for pieces in offload.pieces_away().values() for piece in pieces)


def train(folder: Path, variants: list[dict], hands_over: bool) -> list[dict]:
    """Do two updates of each variant, with or without everything moved out and back between them."""
    from respec_trainer.actor.parallel import shutdown_parallel

    results, actor = [], None
    for changes in variants:
        actor = rebuild_actor(actor, changes) if actor else build_actor(folder, changes)
        batch, advantages = make_batch(actor.hf_config.vocab_size)
        rows = my_rows(actor, batch)
        batch, advantages = batch.rows(rows), advantages[rows]
        old = actor.infer(batch).logprobs
        actor.update(batch, old, advantages)
        seen = hand_over(actor, batch) if hands_over else {}
        actor.update(batch, old, advantages)
        model = sum(p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in actor.engine.module.parameters())
        results.append(seen | {"weights": hf_weights(actor), "model": model})
        actor.engine.destroy()
    shutdown_parallel()
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("llama"), tiny_config("llama"))


@pytest.mark.parametrize("tp", [1, 2])
def test_out_and_back_changes_nothing(folder, tp):
    kinds = KINDS[tp]
    variants = [variant(tp, stage, 3, **{"model.dtype": dtype}) for stage, dtype in kinds]
    moved, plain = (run_ranks(2, train, folder, variants, hands_over) for hands_over in (True, False))
    for rank, (number, kind) in itertools.product(range(2), enumerate(kinds)):
        where = f"rank {rank}, ZeRO-{kind[0]} {kind[1]}"
        result, expected = moved[rank][number], plain[rank][number]
        assert result["scores"] and result["same"] and result["host kept"], where
        for name, weight in result["weights"].items():
            assert torch.equal(weight, expected["weights"][name]), f"{where}: {name} differs after going on"
        check_sizes(kind, result, copies=2 // tp, where=where)


def check_sizes(kind: tuple[int, str], result: dict, copies: int, where: str) -> None:
    """First at least Adam's two moments and the master weights are moved, then the weights."""
    stage, dtype = kind
    whole, without_states, again, without_weights = result["sizes"]
    states, weights = 3 * 4 * result["model"] / copies, result["model"] * (4 if dtype == "fp32" else 2)
    assert without_states == again, where
    assert whole - without_states >= 0.99 * states, f"{where}: only {whole - without_states} bytes left"
    assert again - without_weights >= 0.99 * weights / (copies if stage == 3 else 1), where


class Engine:
    """The parts of DeepSpeed's engine that a move uses."""

    def __init__(self):
        self.module = torch.nn.Linear(2, 2)
        self.optimizer = type("Zero", (), {"optimizer": torch.optim.AdamW(self.module.parameters())})()


def test_on_a_cpu_nothing_moves_but_the_order_is_held():
    from respec_trainer.actor.offload import Offload

    engine = Engine()
    offload, row = Offload(engine), torch.ones(1, 2)
    before = engine.module(row)
    with pytest.raises(RuntimeError, match="weights cannot go out after its optimizer"):
        offload.out("weights")
    offload.out("optimizer")
    with torch.no_grad():
        assert torch.equal(engine.module(row), before)
    with pytest.raises(RuntimeError, match="forward pass while the actor's optimizer"):
        engine.module(row)
    offload.out("weights")
    assert engine.module.weight.untyped_storage().nbytes()
    with torch.no_grad(), pytest.raises(RuntimeError, match="forward pass while the actor's weights"):
        engine.module(row)
    offload.back("weights")
    offload.back("optimizer")
    assert torch.equal(engine.module(row), before)
