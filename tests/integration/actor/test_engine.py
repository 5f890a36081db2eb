"""Actor.infer and Actor.update over ZeRO stages, tensor and data parallelism, against one process with plain AdamW."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from respec_trainer.rollout.batch import Batch
from tests.support.models import save_tiny_model, tiny_config, tiny_model, tiny_run_config
from tests.support.processes.ranks import run_ranks

STEPS = 2
OPTIM = {
    "actor.optim.lr": 1e-2,
    "actor.optim.warmup_steps": 2,  # so that the two updates have different learning rates
    "actor.optim.weight_decay": 0.1,
    "actor.optim.clip": 0.5,  # below the first gradient norm, so that clipping is part of the comparison
    # Where |gradient| << eps = 1e-8 does not hold, Adam divides rounding noise by itself: with it weights differ by
    # 1e-4 between any two orders of summation, one process included.
    "actor.optim.eps": 1e-3,
}


def make_batch(vocab_size: int) -> tuple[Batch, torch.Tensor]:
    """Eight rows of unlike lengths with sampler log-probs, and their advantages."""
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


def reference_scores(model, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies [B, S] of every token but the first."""
    scores = model(tokens).logits[:, :-1].log_softmax(-1)
    logprobs, entropy = scores.gather(-1, tokens[:, 1:, None])[..., 0], -(scores.exp() * scores).sum(-1)
    return torch.nn.functional.pad(logprobs, (1, 0)), torch.nn.functional.pad(entropy, (1, 0))


def train_reference(hf_config, batch: Batch, advantages: torch.Tensor, aggregation: str, updates: list[slice]) -> dict:
    """One update on the rows of each slice, all at once in this process, the objective written out plainly."""
    model = tiny_model(hf_config)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": OPTIM["actor.optim.weight_decay"]},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=OPTIM["actor.optim.eps"])
    norms, losses = [], []
    with torch.no_grad():
        old, entropy = reference_scores(model, batch.tokens)
    for step, rows in enumerate(updates):
        mask, advantage = batch.response_mask[rows], advantages[rows, None]
        ratio = (reference_scores(model, batch.tokens[rows])[0] - old[rows]).exp()
        gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        gain = gain * (old - batch.sampler_logprobs)[rows].exp().clamp(max=2.0)
        by_row = (gain * mask).sum(1)
        loss = -(by_row.sum() / mask.sum() if aggregation == "token" else (by_row / mask.sum(1)).mean())
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM["actor.optim.clip"]).item())
        losses.append(loss.item())
        for group in optimizer.param_groups:
            group["lr"] = OPTIM["actor.optim.lr"] * (step + 1) / 2
        optimizer.step()
        optimizer.zero_grad()
    assert norms[0] > OPTIM["actor.optim.clip"], "clipping must be part of the comparison"
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    mask, mismatch = batch.response_mask, reference_mismatch(old, batch)
    scores = {"old": old * mask, "entropy": entropy * mask, "mismatch": mismatch}
    return scores | {"norms": norms, "losses": losses, "weights": weights}


def reference_mismatch(old: torch.Tensor, batch: Batch) -> dict[str, float]:
    log_ratio = (old - batch.sampler_logprobs)[batch.response_mask].double()
    origins, ratio = batch.origins[batch.response_mask], log_ratio.exp()
    divergence = ratio - 1 - log_ratio
    metrics = {"kl": divergence.mean(), "ratio_max": ratio.max(), "ratio_min": ratio.min()}
    metrics |= {"clipped": (ratio > 2).double().mean()}
    for threshold in (1.1, 1.5, 2):
        metrics[f"above_{threshold}"] = (torch.maximum(ratio, 1 / ratio) > threshold).double().mean()
    for value, origin in enumerate(("plain", "accepted", "bonus")):
        metrics[f"kl_{origin}"] = divergence[origins == value].mean()
    return {f"mismatch/{name}": value.item() for name, value in metrics.items()}


def build_actor(folder: Path, changes: dict):
    from respec_trainer.actor.engine import Actor
    from respec_trainer.actor.parallel import init_parallel

    config = tiny_run_config(folder, OPTIM | changes)
    return Actor(config, init_parallel(config), total_updates=STEPS)


def rebuild_actor(actor, changes: dict):
    """Another actor of the same topology: the process groups stay."""
    from respec_trainer.actor.engine import Actor

    config = tiny_run_config(actor.config.model.path, OPTIM | changes)
    return Actor(config, actor.topology, total_updates=STEPS)


def my_rows(actor, batch: Batch) -> slice:
    share = len(batch) // actor.topology.dp
    return slice(actor.topology.dp_rank * share, (actor.topology.dp_rank + 1) * share)


def hf_weights(actor) -> dict[str, torch.Tensor]:
    """The Hugging Face weights on every rank; raises where ranks that should agree to the bit do not."""
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


def train(folder: Path, variants: list[dict]) -> list[dict]:
    """For each variant of the configuration: this rank's inference, the metrics of each call, the weights after."""
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


def variant(tp: int, stage: int, micro: int, **more) -> dict:
    return {"actor.parallel.tp": tp, "actor.zero.stage": stage, "actor.micro_batch_size": micro} | more


def weight_error(result: dict, expected: dict) -> float:
    """The largest difference of a weight, relative to the largest entry of its tensor."""
    assert result["weights"].keys() == expected["weights"].keys()
    return max(
        ((weight - expected["weights"][name]).abs().max() / expected["weights"][name].abs().max()).item()
        for name, weight in result["weights"].items()
    )


def norm_error(result: dict, expected: dict) -> float:
    norms = [stats["policy/grad_norm"] for stats in result["stats"]]
    return max(abs(norm / want - 1) for norm, want in zip(norms, expected["norms"], strict=True))


def compare(result: dict, expected: dict, label: str) -> None:
    """Assert that a rank's run in fp32 equals the reference."""
    for what in ("old", "entropy"):
        torch.testing.assert_close(result[what], expected[what][result["rows"]], rtol=0, atol=1e-5)
    assert result["counts"] == {STEPS}, f"{label}: updates or Adam's own count are {result['counts']}"
    # fp32 rounding of one update; 3e-7 is seen.
    assert weight_error(result, expected) <= 1e-6, f"{label}: weights differ by {weight_error(result, expected):.1e}"
    assert norm_error(result, expected) <= 1e-5, f"{label}: gradient norms differ by {norm_error(result, expected):.1e}"
    for stats, loss in zip(result["stats"], expected["losses"], strict=True):
        assert stats["policy/loss"] == pytest.approx(loss, rel=1e-5, abs=1e-6)
    check_mismatch(result["stats"][0], expected)


def check_mismatch(stats: dict, expected: dict) -> None:
    measured = {name: value for name, value in stats.items() if name.startswith("mismatch/")}
    assert measured == pytest.approx(expected["mismatch"], rel=1e-4)


def expectation(folder: Path, aggregation: str = "token", updates: list[slice] | None = None) -> dict:
    from respec_trainer.actor.loading import load_hf_config

    hf_config = load_hf_config(folder)
    expected = train_reference(
        hf_config, *make_batch(hf_config.vocab_size), aggregation, updates or [slice(None)] * STEPS
    )
    for name, weight in tiny_model(hf_config).named_parameters():
        moved = (weight - expected["weights"][name]).abs().max()
        assert moved > 1e-3, f"the updates hardly move {name}: their comparison would tell nothing"
    return expected


def check(folder: Path, world_size: int, variants: list[dict], aggregation: str = "token") -> None:
    expected = expectation(folder, aggregation)
    for rank, results in enumerate(run_ranks(world_size, train, folder, variants)):
        for changes, result in zip(variants, results, strict=True):
            compare(result, expected, f"rank {rank} {changes}")
            if rank == 0:
                errors = f"weights {weight_error(result, expected):.1e} norm {norm_error(result, expected):.1e}"
                print(f"{world_size} ranks {changes}: {errors}")


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("qwen3"), tiny_config("qwen3"))


@pytest.fixture(scope="module")
def tied_qwen2(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("qwen2"), tiny_config("qwen2", tied=True))


def test_update_on_one_rank(qwen3):
    check(qwen3, 1, [variant(1, stage, micro) for stage, micro in ((1, 8), (1, 3), (2, 3), (3, 3))])


def test_update_under_tensor_parallelism(qwen3):
    sequence_parallel = {"actor.parallel.sequence_parallel": True}
    check(qwen3, 2, [variant(2, stage, 3) for stage in (1, 2, 3)] + [variant(2, 1, 3, **sequence_parallel)])


def test_update_under_data_parallelism(qwen3):
    check(qwen3, 2, [variant(1, stage, micro) for stage, micro in ((1, 3), (2, 3), (3, 3), (2, 4))])


def test_update_under_both_with_tied_weights(tied_qwen2):
    everything = {"actor.parallel.sequence_parallel": True, "actor.recompute": True}
    check(tied_qwen2, 4, [variant(2, stage, 3, **everything) for stage in (1, 2, 3)] + [variant(2, 1, 4)])


def test_each_response_counts_the_same_under_sequence_aggregation(qwen3):
    check(qwen3, 2, [variant(1, 1, 3, **{"objective.aggregation": "sequence"})], aggregation="sequence")


def test_minibatches_are_updates_of_their_own_against_the_same_old_policy(qwen3):
    expected = expectation(qwen3, updates=[slice(0, 4), slice(4, 8)])
    (result,) = run_ranks(1, train, qwen3, [variant(1, 1, 3, **{"objective.minibatches": 2})])[0]
    assert result["counts"] == {2}
    assert weight_error(result, expected) <= 1e-6
    (stats,) = result["stats"]
    assert stats["policy/grad_norm"] == pytest.approx(sum(expected["norms"]) / 2, rel=1e-5)
    assert stats["policy/loss"] == pytest.approx(sum(expected["losses"]) / 2, rel=1e-5)
    assert stats["policy/kl"] > 0  # the second minibatch sees a policy that has moved
    check_mismatch(stats, expected)


def test_bf16_trains_like_fp32_up_to_its_rounding(qwen3):
    expected = expectation(qwen3)
    variants = [variant(2, stage, 3, **{"model.dtype": "bf16"}) for stage in (1, 2, 3)]
    for changes, result in zip(variants, run_ranks(2, train, qwen3, variants)[0], strict=True):
        assert result["counts"] == {STEPS}
        # A bf16 weight is rounded by up to 2^-9 of itself, and its gradient by about as much in each layer.
        assert weight_error(result, expected) <= 8e-3, changes
        assert norm_error(result, expected) <= 2e-2, changes


def generate(folder: Path, changes: dict, prompts: list[list[int]], count: int):
    from respec_trainer.actor.parallel import shutdown_parallel

    actor = build_actor(folder, changes)
    answer = actor.generate_greedy(prompts, count)
    actor.engine.destroy()
    shutdown_parallel()
    return answer


@pytest.mark.parametrize(("world_size", "stage"), [(1, 1), (2, 3)])
def test_greedy_generation_equals_transformers(qwen3, world_size, stage):
    from respec_trainer.actor.loading import load_hf_config

    model, prompts, count = tiny_model(load_hf_config(qwen3)), [[5, 9, 77], [130], [4, 4, 8, 15, 16]], 6
    changes = variant(world_size, stage, 8, **{"actor.parallel.sequence_parallel": world_size > 1})
    for tokens, logprobs in run_ranks(world_size, generate, qwen3, changes, prompts, count):
        for prompt, new, scores in zip(prompts, tokens, logprobs, strict=True):
            whole = list(prompt)
            for token, score in zip(new, scores, strict=True):
                best = model(torch.tensor([whole])).logits[0, -1].log_softmax(-1).max(0)
                assert (token, score) == (best.indices, pytest.approx(best.values.item(), abs=1e-5))
                whole.append(token)
