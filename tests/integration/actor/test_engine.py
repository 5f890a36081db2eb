"""Actor.infer and Actor.update over ZeRO stages, tensor and data parallelism, against one process with plain AdamW."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.actors import STEPS, build_actor, train, variant
from tests.support.models import save_tiny_model, tiny_config, tiny_model
from tests.support.processes.ranks import run_ranks
from tests.support.reference_actor import expectation, norm_error, weight_error


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
    # The second minibatch sees a policy that has moved. The other direction would differ by several percent.
    assert stats["policy/kl"] == pytest.approx(expected["kl"], rel=1e-3) != 0
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
