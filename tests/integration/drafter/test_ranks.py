"""The learner over several ranks, in the loop with a real actor: it does not change the actor, and the ranks agree."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from respec_trainer.drafter.format import save_drafter
from respec_trainer.rollout.batch import collate
from tests.support.drafters import DRAFT_IDS, target_config, tiny_drafter
from tests.support.learners import random_samples, score
from tests.support.models import save_tiny_model, tiny_model, tiny_run_config
from tests.support.processes.ranks import run_ranks

STEPS = 20
LENGTHS = [(3, 6 + i % 5) for i in range(8)]


def settings(folder, tp: int, **drafter):
    keys = {"path": str(folder / "drafter"), "batch_size": 4, "micro_batch_size": 2, "unroll": 3, "lr": 1e-3}
    changes = {f"drafter.{key}": value for key, value in (keys | drafter).items()}
    changes |= {"speculation.algorithm": "eagle3", "actor.parallel.tp": tp, "actor.optim.lr": 1e-3}
    return tiny_run_config(folder / "actor", changes | {"data.prompts_per_step": 2})


def train(configs: list, steps: int, lengths=LENGTHS) -> list[tuple]:
    """Return for each configuration the actor's shards and gradient norms; the drafter's weights, metrics, gradient."""
    from respec_trainer.actor.engine import Actor
    from respec_trainer.actor.parallel import init_parallel, shutdown_parallel
    from respec_trainer.drafter.online.learner import LearnerRank
    from respec_trainer.drafter.online.setup import setup_learner

    topology, results = init_parallel(configs[0]), []
    for config in configs:
        actor = Actor(config, topology, total_updates=steps)
        learner = setup_learner(config, actor.hf_config, LearnerRank.of(topology, config.objective.minibatches))
        share = len(lengths) // topology.dp
        rows = slice(topology.dp_rank * share, (topology.dp_rank + 1) * share)
        norms, metrics = [], []
        for step in range(steps):
            learner.update(lambda: dist.get_rank() == 0)
            samples = random_samples(lengths, step, learner.version)
            rewards = (torch.arange(8) % 3 == step % 3).float().view(2, 4)
            batch = collate(samples, 0).rows(rows)
            old = actor.infer(batch, learner.wants)
            learner.observe(samples, old, rewards, 1.0)
            advantages = actor.objective.advantages(rewards).flatten()[rows]
            norms.append(actor.update(batch, old.logprobs, advantages)["policy/grad_norm"])
            metrics.append(learner.metrics())
        shards = [parameter.detach().clone() for parameter in actor.engine.module.parameters()]
        weights = {name: tensor.clone() for name, tensor in learner.named_tensors()}
        updates = getattr(learner, "updates", None)
        results.append((shards, norms, weights, metrics, updates and updates.flat[: updates.size].clone()))
        actor.engine.destroy()
    shutdown_parallel()
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    save_tiny_model(folder / "actor", target_config())
    save_drafter(tiny_drafter(), DRAFT_IDS, folder / "drafter")
    return folder


def equal(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("tp", [1, 2])
def test_the_actor_is_the_same_and_drafters_agree(folder, tp):
    configs = [settings(folder, tp, weighting=weighting) for weighting in ("none", "reward")]
    ranks = run_ranks(2, train, configs, STEPS)
    for (shards_off, norms_off, *_), (shards_on, norms_on, _, metrics, _) in ranks:
        assert equal(shards_off, shards_on) and norms_off == norms_on, "to the bit, over all steps"
        assert sum(m["drafter/updates"] for m in metrics) > STEPS and metrics[-1]["drafter/dropped"] == 0
        assert metrics[-1]["drafter/loss"] < metrics[1]["drafter/loss"]
    drafters = [results[1][2] for results in ranks]
    assert equal(drafters[0].values(), drafters[1].values()), "every rank holds the same drafter, to the bit"
    assert not equal(drafters[0].values(), ranks[0][0][2].values()), "and not the one of the folder"
    reported = [[{k: v for k, v in m.items() if "time" not in k} for m in results[1][3]] for results in ranks]
    assert reported[0] == reported[1]


def mean_gradient(config) -> torch.Tensor:
    """The gradient of one update on all rows of one step, as it was applied."""
    return train([config], 2, [(3, 8)] * 8)[0][4]


def test_two_ranks_learn_what_one_does(folder):
    """One update on eight rows, split over ranks by data or tensor parallelism, has the gradient of the whole batch."""
    options = {"weighting": "reward", "batch_size": 8, "micro_batch_size": 8}
    (one,) = run_ranks(1, mean_gradient, settings(folder, 1, **options))
    for tp in (1, 2):
        for two in run_ranks(2, mean_gradient, settings(folder, tp, **options)):
            # fp32 rounding, of the actor's features and of sums in another order.
            torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5 * one.abs().max().item())


def keep(config, steps: int) -> list[tuple]:
    """Return after each step this rank's share of each stored step, the number of rows kept, and the metrics."""
    from respec_trainer.actor.parallel import init_parallel, shutdown_parallel
    from respec_trainer.drafter.online.learner import LearnerRank
    from respec_trainer.drafter.online.setup import setup_learner

    topology, history = init_parallel(config), []
    learner = setup_learner(config, target_config(), LearnerRank.of(topology, config.objective.minibatches))
    # Rank 1's responses are four times as long as rank 0's.
    lengths = [(3, 5 + 2 * i) for i in range(16)] + [(3, 4 * (5 + 2 * i)) for i in range(16)]
    model = tiny_model(target_config())
    for step in range(steps):
        learner.update(lambda: False)
        samples = random_samples(lengths, step)
        mine = range(16 * topology.dp_rank, 16 * topology.dp_rank + 16)
        inference = score(model, samples[mine.start : mine.stop])
        learner.observe(samples, inference, torch.arange(32.0).view(8, 4), 1.0)
        shares = [stored.share for stored in learner.buffer.steps]
        history.append((shares, len(learner.buffer.newest()), learner.metrics()))
    shutdown_parallel()
    return history


@pytest.mark.parametrize("retention", ["recency", "reservoir"])
def test_ranks_keep_the_same_share_of_each_step(folder, retention):
    """Though one rank's responses are longer, and its memory full earlier: otherwise short ones would be kept more."""
    config = settings(folder, 1, weighting="uniform", memory_mb=2, retention=retention, batch_size=2)
    one, other = run_ranks(2, keep, config, 4)
    assert [shares for shares, *_ in one] == [shares for shares, *_ in other]
    assert one[-1][1] == other[-1][1] < 16, "in part, and equally many"
    for name in ("drafter/asked_length", "drafter/kept_length"):
        assert [metrics[name] for *_, metrics in one] == [metrics[name] for *_, metrics in other]
    # 16 responses of 5, 7, .. 35 tokens and 16 of four times as many.
    assert one[0][2]["drafter/asked_length"] == pytest.approx(20 * 2.5)
    kept = sum(metrics["drafter/kept_length"] for *_, metrics in one) / 4
    assert kept == pytest.approx(50, rel=0.3)  # of about ten rows a rank; alone, rank 0 would keep four times as many
