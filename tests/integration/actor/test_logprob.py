"""Vocabulary-parallel log-probs and entropies against float64 log-softmax over the vocabulary, or what is kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.support.processes.ranks import run_ranks
from tests.support.truncation import truncate

VOCAB, HIDDEN, COUNT, TEMPERATURE = 11, 6, 7, 0.5  # two ranks hold 6 rows each; the last row is padding


def problem() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "hidden": 3 * torch.randn(COUNT, HIDDEN, generator=generator),
        "weight": torch.randn(VOCAB, HIDDEN, generator=generator),
        "targets": torch.randint(0, VOCAB, (COUNT,), generator=generator),
        "factors": torch.randn(2, COUNT, generator=generator),
    }


def kept(scores: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """The mask [n, V] of kept tokens: those of `truncate`, and each row's target."""
    rows = [truncate(row.numpy(), top_k, top_p) > 0 for row in scores.softmax(-1)]
    return torch.tensor(np.stack(rows)) | torch.nn.functional.one_hot(problem()["targets"], VOCAB).bool()


def expectation(
    use_logprob: bool = True, use_entropy: bool = True, top_k: int = -1, top_p: float = 1.0
) -> dict[str, torch.Tensor]:
    data = problem()
    hidden = data["hidden"].double().requires_grad_()
    weight = data["weight"].double().requires_grad_()
    scores = hidden @ weight.t() / TEMPERATURE
    sums = scores.logsumexp(-1)
    scores = scores.masked_fill(~kept(scores.detach(), top_k, top_p), -1e9).log_softmax(-1)
    logprobs, entropies = scores.gather(1, data["targets"][:, None])[:, 0], -(scores.exp() * scores).sum(-1)
    loss = use_logprob * (logprobs * data["factors"][0]).sum() + use_entropy * (entropies * data["factors"][1]).sum()
    loss.backward()
    values = {"logprobs": logprobs, "entropies": entropies, "logsumexps": sums.detach()}
    return values | {"hidden": hidden.grad, "weight": weight.grad}


def score(cases: list[tuple]) -> list[dict[str, torch.Tensor]]:
    """Return values and gradients for each (chunk, rows, use_logprob, use_entropy, top_k, top_p).

    The weight's gradient is that of all ranks. top_k and top_p may be left out.
    """
    from respec_trainer.actor.logprob import chunked_logprobs
    from respec_trainer.actor.truncation import Truncation

    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    share, data, results = -(-VOCAB // size), problem(), []
    padded = torch.nn.functional.pad(data["weight"], (0, 0, 0, share * size - VOCAB))
    for chunk, rows, use_logprob, use_entropy, *truncation in cases:
        hidden = data["hidden"][:rows].clone().requires_grad_()
        weight = padded[rank * share : (rank + 1) * share].clone().requires_grad_()
        options = {"vocab_size": VOCAB, "temperature": TEMPERATURE, "chunk": chunk, "group": dist.group.WORLD}
        options["truncation"] = Truncation(*truncation)
        logprobs, entropies, sums = chunked_logprobs(hidden, weight, data["targets"][:rows], **options)
        factors = data["factors"][:, :rows]
        loss = use_logprob * (logprobs * factors[0]).sum() + use_entropy * (entropies * factors[1]).sum()
        loss.backward()
        dist.all_reduce(hidden.grad)  # like the caller's copy_to_tensor_model_parallel_region
        parts = [torch.empty_like(weight.grad) for _ in range(size)]
        dist.all_gather(parts, weight.grad)
        whole = torch.cat(parts)[:VOCAB]
        found = {"logprobs": logprobs, "entropies": entropies, "logsumexps": sums}
        found |= {"hidden": hidden.grad, "weight": whole}
        results.append({name: value.detach() for name, value in found.items()})
    return results


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_values_and_gradients_for_any_chunk(world_size):
    cases = [(chunk, COUNT, *use) for chunk in (1, 3, 100) for use in ((True, True), (True, False), (False, True))]
    for rank, results in enumerate(run_ranks(world_size, score, cases)):
        for case, result in zip(cases, results, strict=True):
            for name, value in expectation(*case[2:]).items():
                # float32 logits of size 40 carry 2e-6; gradients add up seven of them.
                message = f"rank {rank} {case}: {name}"
                torch.testing.assert_close(
                    result[name].double(), value, rtol=1e-5, atol=2e-5, msg=lambda text, m=message: f"{m}\n{text}"
                )


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_after_truncation_values_and_gradients_are_those_of_what_is_kept(world_size):
    filters = [(3, 1.0), (8, 1.0), (-1, 0.7), (9, 0.9999), (2, 0.1), (11, 0.999)]
    # Some targets are kept only because they are targets; others are among several kept tokens.
    scores = problem()["hidden"].double() @ problem()["weight"].double().t() / TEMPERATURE
    rows = list(zip(scores.softmax(-1).numpy(), problem()["targets"].tolist(), strict=True))
    assert {bool(truncate(row, 8, 1.0)[target] > 0) for row, target in rows} == {True, False}
    cases = [(chunk, COUNT, True, True, *pair) for chunk in (3, 100) for pair in filters]
    for rank, results in enumerate(run_ranks(world_size, score, cases)):
        for case, result in zip(cases, results, strict=True):
            for name, value in expectation(True, True, *case[4:]).items():
                message = f"rank {rank} {case}: {name}"
                torch.testing.assert_close(
                    result[name].double(), value, rtol=1e-5, atol=2e-5, msg=lambda text, m=message: f"{m}\n{text}"
                )


def test_nothing_to_score_gives_nothing_and_no_gradient():
    for (result,) in run_ranks(2, score, [(4, 0, True, True)]):
        assert result["logprobs"].shape == result["entropies"].shape == (0,)
        assert not result["weight"].any()
