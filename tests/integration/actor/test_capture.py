"""The data that `actor.infer` captures, against transformers' layers; and that capture changes nothing else."""

from __future__ import annotations

import pytest
import torch

from tests.support.actors import build_actor, make_batch, my_rows, rebuild_actor, variant
from tests.support.drafters import DRAFT_IDS, target_config
from tests.support.models import save_tiny_model, tiny_model
from tests.support.processes.ranks import run_ranks

LAYERS, TEMPERATURE = (0, 1, 2), 0.7
SPLIT = {"actor.parallel.sequence_parallel": True, "actor.recompute": True}


def capture(folder, variants: list[dict]) -> list[tuple]:
    """Return, for each variant on this rank, the first row of its share, and inference with and without capture."""
    from respec_trainer.actor.parallel import shutdown_parallel
    from respec_trainer.capture import Wanted

    results, actor = [], None
    for changes in variants:
        changes = changes | {"rollout.sampling.temperature": TEMPERATURE, "actor.logprob_chunk": 5}
        actor = rebuild_actor(actor, changes) if actor else build_actor(folder, changes)
        batch, _ = make_batch(actor.hf_config.vocab_size)
        rows = my_rows(actor, batch)
        with_capture = actor.infer(batch.rows(rows), Wanted(LAYERS, DRAFT_IDS))
        results.append((rows.start, with_capture, actor.infer(batch.rows(rows))))
        actor.engine.destroy()
    shutdown_parallel()
    return results


def expectation(hf_config) -> dict:
    model = tiny_model(hf_config)
    batch, _ = make_batch(hf_config.vocab_size)
    with torch.no_grad():
        answer = model(batch.tokens, output_hidden_states=True)
    states = answer.hidden_states  # the embedding first, the last one after the final norm
    return {
        "batch": batch,
        "features": torch.cat([states[layer + 1] for layer in LAYERS], -1),
        "hidden": states[-1],
        "logsumexp": (answer.logits / TEMPERATURE).logsumexp(-1),
        "embeddings": model.get_input_embeddings().weight.detach(),
        "output": model.get_output_embeddings().weight.detach(),
    }


def compare(captured, first: int, expected: dict) -> set[int]:
    """Check the captured rows; return their indices in the whole batch."""
    batch, seen = expected["batch"], set()
    for part in captured.rows:
        row = first + part.row
        before = batch.response_mask[row].nonzero()[:, 0] - 1  # the position before a token predicts it
        pairs = [
            (part.features, expected["features"][row, : batch.lengths[row]]),
            (part.hidden, expected["hidden"][row, before]),
            (part.logsumexp, expected["logsumexp"][row, before]),
        ]
        for value, reference in pairs:
            # fp32 rounding over four layers, added up in another order by each rank.
            torch.testing.assert_close(value, reference, rtol=1e-5, atol=2e-5)
        seen.add(row)
    torch.testing.assert_close(captured.embeddings, expected["embeddings"][captured.token_ids], rtol=0, atol=0)
    torch.testing.assert_close(captured.output_rows, expected["output"][DRAFT_IDS], rtol=0, atol=0)
    return seen


@pytest.mark.parametrize(
    ("world_size", "variants"),
    [
        (1, [variant(1, 1, 3), variant(1, 3, 8)]),
        (2, [variant(2, 1, 3), variant(2, 3, 3, **SPLIT)]),
        (2, [variant(1, 3, 3)]),
    ],
)
def test_captured_states_equal_transformers(tmp_path, world_size, variants):
    hf_config = target_config(tied=len(variants) == 2)
    results = run_ranks(world_size, capture, save_tiny_model(tmp_path / "actor", hf_config), variants)
    expected = expectation(hf_config)
    for number in range(len(variants)):
        seen = []
        for rank in range(world_size):
            first, with_capture, without = results[rank][number]
            assert without.captured is None
            assert torch.equal(with_capture.logprobs, without.logprobs)
            assert torch.equal(with_capture.entropy, without.entropy)
            seen += compare(with_capture.captured, first, expected)
        assert sorted(seen) == list(range(8)), "every row is captured once, by one rank"
