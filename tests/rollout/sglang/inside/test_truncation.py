"""rollout/sglang/inside/truncation.py: one distribution for draws and log-probs, without SGLang."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from respec_trainer.rollout.sglang.inside.cpu import put_stand_in_on_path
from respec_trainer.rollout.sglang.inside.truncation import draw_truncated, with_truncated_logprobs
from tests.support.truncation import truncate

put_stand_in_on_path()
VOCAB = 37
WHOLE = 1 << 30  # SGLang's top_k of a request without one


def info(top_ks, top_ps, temperatures=None) -> SimpleNamespace:
    temperatures = temperatures or [1.0] * len(top_ks)
    return SimpleNamespace(
        top_ks=torch.tensor(top_ks),
        top_ps=torch.tensor(top_ps),
        temperatures=torch.tensor(temperatures)[:, None],
        need_top_k_sampling=any(k < WHOLE for k in top_ks),
        need_top_p_sampling=any(p < 1 for p in top_ps),
        is_all_greedy=False,
    )


def random_logits(rows: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


FILTERS = [([5, 5, 5], [1.0, 1.0, 1.0]), ([WHOLE] * 3, [0.9, 0.5, 0.1]), ([4, WHOLE, 9], [0.6, 0.7, 1.0])]


@pytest.mark.parametrize(("top_ks", "top_ps"), FILTERS)
def test_draws_are_from_what_is_kept_and_log_probs_are_taken_of_it(top_ks, top_ps):
    probs = random_logits(3).softmax(-1)
    expected = [truncate(row.double().numpy(), k, p) for row, k, p in zip(probs, top_ks, top_ps, strict=True)]
    seen = []

    def draw(sampler, given, sampling, positions, simple):
        seen.append((given, positions, simple))
        return "tokens"

    assert draw_truncated(draw, "sampler", probs, info(top_ks, top_ps), "positions", False) == "tokens"
    assert seen == [(probs, "positions", True)] and seen[0][0] is probs
    np.testing.assert_allclose(probs.numpy(), expected, rtol=1e-5)  # float32 sums of 37 numbers


def test_without_truncation_nothing_changes():
    probs = random_logits(2).softmax(-1)
    before = probs.clone()
    draw_truncated(lambda *_: None, None, probs, info([WHOLE] * 2, [1.0] * 2), None, True)
    assert torch.equal(probs, before)
    output = SimpleNamespace(next_token_logprobs="as SGLang computed them")
    with_truncated_logprobs(None, SimpleNamespace(sampling_info=info([WHOLE], [1.0])), output, None, chain_stride=1)
    assert output.next_token_logprobs == "as SGLang computed them"


def verified(logits, tokens, sampling, **layout) -> np.ndarray:
    output = SimpleNamespace(next_token_logits=logits, next_token_logprobs=None)
    with_truncated_logprobs(None, SimpleNamespace(sampling_info=sampling), output, torch.tensor(tokens), **layout)
    return output.next_token_logprobs.numpy()


@pytest.mark.parametrize(("top_ks", "top_ps"), FILTERS)
def test_verified_tokens_have_log_probs_of_what_is_kept(top_ks, top_ps):
    """Trees of 4 nodes, of which each request accepted a path of up to 3; the last request has another temperature."""
    logits, temperatures = random_logits(12, seed=1), [1.0, 0.5, 2.0]
    paths = torch.tensor([[0, 2, -1], [4, -1, -1], [8, 9, 11]])
    likely = logits.argmax(-1)
    found = verified(logits, likely.tolist(), info(top_ks, top_ps, temperatures), accept_index=paths)
    assert found.shape == (3, 3)
    for request, path in enumerate(paths.tolist()):
        for depth, node in enumerate(node for node in path if node >= 0):
            probs = (logits[node].double() / temperatures[request]).softmax(-1).numpy()
            kept = truncate(probs, top_ks[request], top_ps[request])
            assert found[request, depth] == pytest.approx(np.log(kept[likely[node]]), abs=1e-5)


def test_a_chain_has_one_row_for_each_token():
    logits, sampling = random_logits(4, seed=2), info([3, WHOLE], [1.0, 0.5])
    tokens = logits.argmax(-1).tolist()
    found = verified(logits, tokens, sampling, chain_stride=2)
    for row, (k, p) in enumerate([(3, 1.0), (3, 1.0), (WHOLE, 0.5), (WHOLE, 0.5)]):
        kept = truncate(logits[row].double().softmax(-1).numpy(), k, p)
        assert found[row // 2, row % 2] == pytest.approx(np.log(kept[tokens[row]]), abs=1e-5)


def test_a_token_that_is_not_kept_has_no_probability():
    logits = random_logits(1, seed=3)
    (value,) = verified(logits, [int(logits.argmin())], info([3], [1.0]), chain_stride=1)[0]
    assert value == torch.finfo(torch.float32).min


def test_greedy_tokens_keep_their_log_probs_of_the_whole_vocabulary():
    """SGLang gives greedy requests a top_k of 1, so each log-prob would be 0, and the canary blind."""
    output = SimpleNamespace(next_token_logits=random_logits(2), next_token_logprobs="as SGLang computed them")
    greedy = info([1, 1], [1.0, 1.0])
    greedy.is_all_greedy = True
    with_truncated_logprobs(None, SimpleNamespace(sampling_info=greedy), output, torch.tensor([0, 1]), chain_stride=1)
    assert output.next_token_logprobs == "as SGLang computed them"
