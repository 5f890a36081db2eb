"""The actor saved and loaded: one more update gives the same bits, or nearly the same numbers at other layouts.

All layouts of one world size and tensor parallelism use one process group; the checkpoints are in one folder.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from tests.support.actors import build_actor, hf_weights, make_batch, my_rows, rebuild_actor, variant
from tests.support.models import save_tiny_model, tiny_config
from tests.support.processes.ranks import run_ranks

# (ranks, tensor parallelism), in the order in which they save -> (ZeRO stage, dtype). Every stage is in each; its other
# dtype only with two ranks, where tensors are cut or copied.
STAGES = [(1, "fp32"), (2, "bf16"), (3, "fp32")]
KINDS = {
    (1, 1): STAGES,
    (2, 2): [*STAGES, (2, "fp32"), (3, "bf16")],
    (2, 1): [*STAGES, (1, "bf16"), (3, "bf16")],
    (4, 2): STAGES,
}
# The third update has another learning rate than the first two.
SETTINGS = {"actor.optim.schedule": "linear", "actor.optim.warmup_steps": 1, "actor.optim.min_lr_ratio": 0.3}


class Stepper:
    """An actor and the rows on which this rank trains it."""

    def __init__(self, actor):
        batch, advantages = make_batch(actor.hf_config.vocab_size)
        rows = my_rows(actor, batch)
        self.actor, self.batch, self.advantages = actor, batch.rows(rows), advantages[rows]

    def update(self) -> dict:
        return self.actor.update(self.batch, self.actor.infer(self.batch).logprobs, self.advantages)


def settings(tp: int, kind: tuple[int, str]) -> dict:
    return variant(tp, kind[0], 3, **SETTINGS | {"model.dtype": kind[1]})


def make(folder: Path, changes: dict, actor=None):
    actor = rebuild_actor(actor, changes) if actor else build_actor(folder, changes)
    return actor, Stepper(actor)


def checkpoints(actor, run: Path):
    import torch.distributed as dist

    from respec_trainer.checkpoint.checkpoints import Checkpoints, Parts

    topology = actor.topology
    control = dist.new_group(backend="gloo")
    store = Checkpoints(actor.config, run, topology.rank, topology.world_size, control, lambda text: None)
    return store, Parts(actor)


def seen(actor, stats: dict) -> dict:
    return {"weights": hf_weights(actor), "stats": stats, "counts": (actor.updates, actor.engine.get_lr()[0])}


def save_and_resume(folder: Path, runs: Path, tp: int, kinds: list) -> list[dict]:
    """Do two updates of each kind, a save and a third; then the third again with another actor from the checkpoint."""
    from respec_trainer.actor.parallel import shutdown_parallel

    results, actor = [], None
    for kind in kinds:
        changes = settings(tp, kind)
        actor, stepper = make(folder, changes, actor)
        for _ in range(2):
            stepper.update()
        store, parts = checkpoints(actor, runs / f"zero{kind[0]}-{kind[1]}")
        store.save(2, parts, {"reward/mean": 0.5})
        at_save = seen(actor, {})
        draw = torch.rand(4)
        third = seen(actor, stepper.update())  # while the threads write
        store.wait()
        actor.engine.destroy()

        actor, stepper = make(folder, changes, actor)
        store, parts = checkpoints(actor, runs / f"zero{kind[0]}-{kind[1]}")
        torch.manual_seed(99)
        done = store.resume(parts)
        resumed, same_draw = seen(actor, {}), torch.equal(torch.rand(4), draw)
        again = seen(actor, stepper.update())
        results.append({"at save": at_save, "third": third, "resumed": resumed, "again": again})
        results[-1] |= {"done": done, "draw": same_draw}
        actor.engine.destroy()
    shutdown_parallel()
    return results


def resume_elsewhere(folder: Path, pairs: list, tp: int) -> list[dict]:
    """Return, for each checkpoint, the weights of an actor of the given kind: when loaded, and one update later."""
    from respec_trainer.actor.parallel import shutdown_parallel

    results, actor = [], None
    for source, kind in pairs:
        actor, stepper = make(folder, settings(tp, kind) | {"checkpoint.resume": str(source)}, actor)
        store, parts = checkpoints(actor, source.parent / "another")
        assert store.resume(parts) == 2
        loaded = seen(actor, {})
        results.append({"source": source.name, "kind": kind, "loaded": loaded, "next": seen(actor, stepper.update())})
        actor.engine.destroy()
    shutdown_parallel()
    return results


def save_from_the_host(folder: Path, tp: int, kinds: list) -> list[bool]:
    """Return, for each kind, whether saves are equal with everything on its device, partly off it, and all off it."""
    from respec_trainer.actor.offload import Offload
    from respec_trainer.actor.parallel import shutdown_parallel
    from respec_trainer.actor.state import ActorState

    results, actor = [], None
    for kind in kinds:
        actor, stepper = make(folder, settings(tp, kind), actor)
        offload = Offload(actor.engine, moves=True)
        state, same = ActorState(actor.engine, actor.topology, offload), []
        fresh = state.save()
        same.append(
            fresh.counts["adam_steps"] == 0 and not any(t.any() for k, t in fresh.fragments.items() if "exp" in k)
        )
        stepper.update()
        saved = state.save()
        expected = {key: fragment.clone() for key, fragment in saved.fragments.items()}
        same.append(saved.counts["adam_steps"] == 1)
        for part in ("optimizer", "weights"):
            offload.out(part)
            again = state.save()
            same += [again.counts == saved.counts, again.fragments.keys() == expected.keys()]
            same += [torch.equal(again.fragments[key], fragment) for key, fragment in expected.items()]
        with pytest.raises(RuntimeError, match="bring them back first"):
            state.load(lambda *_: None, saved.counts)
        for part in ("weights", "optimizer"):
            offload.back(part)
        results.append(all(same))
        actor.engine.destroy()
    shutdown_parallel()
    return results


def differences(left: dict, right: dict) -> list[str]:
    return [name for name in right["weights"] if not torch.equal(left["weights"][name], right["weights"][name])]


def distance(left: dict, right: dict) -> float:
    """Return the largest difference of two weights."""
    return max((left["weights"][name] - weight).abs().max().item() for name, weight in right["weights"].items())


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict:
    """Run every layout; return the folder of the model, the folders of the runs, and the results of all ranks."""
    model = save_tiny_model(tmp_path_factory.mktemp("model"), tiny_config("qwen3", tied=True))
    found = {}
    for world_size, tp in KINDS:
        runs = tmp_path_factory.mktemp(f"world{world_size}-tp{tp}")
        work = save_and_resume, model, runs, tp, KINDS[world_size, tp]
        found[world_size, tp] = runs, run_ranks(world_size, *work, timeout=400)
    return {"model": model, "found": found}


@pytest.mark.parametrize("place", KINDS)
def test_resumed_at_the_same_layout_it_goes_on_to_the_bit(saved, place):
    _, ranks = saved["found"][place]
    for rank, results in enumerate(ranks):
        for kind, result in zip(KINDS[place], results, strict=True):
            where = f"rank {rank}, ZeRO-{kind[0]} {kind[1]}"
            assert (result["done"], result["draw"]) == (2, True), where
            for one, other in (("at save", "resumed"), ("third", "again")):
                assert differences(result[one], result[other]) == [], f"{where}: {one}"
                assert result[one]["counts"] == result[other]["counts"], where
                assert result[one]["stats"] == result[other]["stats"], where
            assert differences(result["at save"], result["third"]) != [], where
            assert result["third"]["counts"][0] == 3


# (ranks, tensor parallelism) and kinds of the saved and of the loading run.
MOVES = [((4, 2), (2, 1)), ((2, 1), (2, 2)), ((1, 1), (4, 2)), ((2, 2), (1, 1))]


@pytest.mark.parametrize(("source", "target"), MOVES)
def test_resumed_at_another_layout_the_weights_are_the_same_and_the_next_update_nearly(saved, source, target):
    """Other layouts add the same numbers in another order: the weights, up to 1.7, then differ by less than 1e-6."""
    runs, ranks = saved["found"][source]
    pairs = [(runs / f"zero{stage}-fp32", (other, "fp32")) for stage, other in ((1, 3), (3, 1), (3, 2))]
    here = run_ranks(target[0], resume_elsewhere, saved["model"], pairs, target[1], timeout=400)
    expected = {f"zero{kind[0]}-{kind[1]}": result for kind, result in zip(KINDS[source], ranks[0], strict=True)}
    for result in itertools.chain(*here):
        want, where = expected[result["source"]], f"{result['source']} -> {result['kind']}"
        assert differences(result["loaded"], want["at save"]) == [], where
        assert result["next"]["counts"] == want["third"]["counts"], where
        assert distance(result["next"], want["third"]) <= 1e-6, where
        assert distance(want["at save"], want["third"]) >= 1e-3, where


def test_at_another_layout_bf16_weights_are_their_masters_rounded_alike(saved):
    runs, ranks = saved["found"][2, 2]
    pairs = [(runs / "zero3-bf16", (stage, "bf16")) for stage in (1, 2)]
    (results,) = run_ranks(1, resume_elsewhere, saved["model"], pairs, 1, timeout=400)
    expected = ranks[0][KINDS[2, 2].index((3, "bf16"))]
    for result in results:
        assert differences(result["loaded"], expected["at save"]) == []
        assert result["loaded"]["counts"] == expected["at save"]["counts"]


def test_an_actor_off_its_device_is_saved_from_where_it_is(saved):
    kinds = [(1, "bf16"), (2, "fp32"), (3, "bf16")]
    assert run_ranks(2, save_from_the_host, saved["model"], 1, kinds) == [[True] * len(kinds)] * 2
