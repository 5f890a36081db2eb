"""Vocabulary-parallel log-probs and entropies against float64 log-softmax over the whole vocabulary."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.support.processes.ranks import run_ranks

VOCAB, HIDDEN, COUNT, TEMPERATURE = 11, 6, 7, 0.5  # two ranks hold 6 rows each; the last row is padding


def problem() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "hidden": 3 * torch.randn(COUNT, HIDDEN, generator=generator),
        "weight": torch.randn(VOCAB, HIDDEN, generator=generator),
        "targets": torch.randint(0, VOCAB, (COUNT,), generator=generator),
        "factors": torch.randn(2, COUNT, generator=generator),
    }


def expectation(use_logprob: bool, use_entropy: bool) -> dict[str, torch.Tensor]:
    data = problem()
    hidden = data["hidden"].double().requires_grad_()
    weight = data["weight"].double().requires_grad_()
    scores = (hidden @ weight.t() / TEMPERATURE).log_softmax(-1)
    logprobs, entropies = scores.gather(1, data["targets"][:, None])[:, 0], -(scores.exp() * scores).sum(-1)
    loss = use_logprob * (logprobs * data["factors"][0]).sum() + use_entropy * (entropies * data["factors"][1]).sum()
    loss.backward()
    sums = (hidden @ weight.t() / TEMPERATURE).logsumexp(-1)
    values = {"logprobs": logprobs, "entropies": entropies, "logsumexps": sums.detach()}
    return values | {"hidden": hidden.grad, "weight": weight.grad}


def score(cases: list[tuple[int, int, bool, bool]]) -> list[dict[str, torch.Tensor]]:
    """Return values and gradients for each (chunk, rows, use_logprob, use_entropy), the weight's of all ranks."""
    from respec_trainer.actor.logprob import chunked_logprobs

    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    share, data, results = -(-VOCAB // size), problem(), []
    padded = torch.nn.functional.pad(data["weight"], (0, 0, 0, share * size - VOCAB))
    for chunk, rows, use_logprob, use_entropy in cases:
        hidden = data["hidden"][:rows].clone().requires_grad_()
        weight = padded[rank * share : (rank + 1) * share].clone().requires_grad_()
        options = {"vocab_size": VOCAB, "temperature": TEMPERATURE, "chunk": chunk, "group": dist.group.WORLD}
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


def test_nothing_to_score_gives_nothing_and_no_gradient():
    for (result,) in run_ranks(2, score, [(4, 0, True, True)]):
        assert result["logprobs"].shape == result["entropies"].shape == (0,)
        assert not result["weight"].any()
