"""actor/logprob.py on one rank, and its mask of padding. On several: tests/integration/actor/test_logprob.py."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from respec_trainer.actor.logprob import chunked_logprobs, mask_padding

VOCAB, ROWS, HIDDEN, COUNT = 11, 14, 6, 7


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('store')}/s", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize(("vocab", "kept"), [(20, 4), (14, 4), (13, 3), (11, 1), (10, 0), (9, 0), (3, 0)])
def test_a_rank_s_columns_of_padding_are_masked_also_if_it_has_no_others(vocab, kept):
    logits = mask_padding(torch.ones(2, 4), 10, vocab)  # this rank's columns are tokens 10 to 13
    assert (logits == 1).sum(1).tolist() == [kept] * 2
    assert (logits[:, kept:] == -1e30).all() and logits[:, kept:].exp().eq(0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_those_of_the_whole_distribution(group, chunk, temperature, dtype):
    generator = torch.Generator().manual_seed(3)
    hidden = (3 * torch.randn(COUNT, HIDDEN, generator=generator)).to(dtype).requires_grad_()
    weight = torch.randn(ROWS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    targets, factors = (
        torch.randint(0, VOCAB, (COUNT,), generator=generator),
        torch.randn(2, COUNT, generator=generator),
    )
    options = {"vocab_size": VOCAB, "temperature": temperature, "chunk": chunk, "group": group}
    logprobs, entropies, sums = chunked_logprobs(hidden, weight, targets, **options)
    assert not sums.requires_grad
    with torch.no_grad():
        again = chunked_logprobs(hidden, weight, targets, **options)
    for value, same in zip((logprobs, entropies, sums), again, strict=True):
        assert value.dtype == torch.float32 and torch.equal(value, same)
    found = torch.autograd.grad((logprobs * factors[0] + entropies * factors[1]).sum(), (hidden, weight))

    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    scores = exact[0] @ exact[1][:VOCAB].t() / temperature
    expected = scores.log_softmax(-1)
    values = expected.gather(1, targets[:, None])[:, 0], -(expected.exp() * expected).sum(-1), scores.logsumexp(-1)
    for value, right in zip((logprobs, entropies, sums), values, strict=True):
        torch.testing.assert_close(value.double(), right, rtol=1e-5, atol=2e-5)
    gradients = torch.autograd.grad((values[0] * factors[0] + values[1] * factors[1]).sum(), exact)
    for value, right in zip(found, gradients, strict=True):
        torch.testing.assert_close(value.double(), right, rtol=1e-5, atol=1e-4)
    assert not found[1][VOCAB:].any(), "padding has no gradient"


@pytest.mark.parametrize("wanted", [0, 1])
def test_one_of_the_two_may_be_differentiated_alone(group, wanted):
    hidden, weight = torch.randn(COUNT, HIDDEN, requires_grad=True), torch.randn(VOCAB, HIDDEN)
    options = {"vocab_size": VOCAB, "temperature": 0.5, "chunk": 3, "group": group}
    outputs = chunked_logprobs(hidden, weight, torch.arange(COUNT), **options)
    (found,) = torch.autograd.grad(outputs[wanted].sum(), hidden)
    exact = hidden.detach().double().requires_grad_()
    expected = (exact @ weight.double().t() / 0.5).log_softmax(-1)
    values = expected[torch.arange(COUNT), torch.arange(COUNT)], -(expected.exp() * expected).sum(-1)
    (right,) = torch.autograd.grad(values[wanted].sum(), exact)
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5)


def test_nothing_to_score_gives_nothing_and_a_gradient_of_zero(group):
    hidden, weight = torch.zeros(0, HIDDEN, requires_grad=True), torch.randn(ROWS, HIDDEN, requires_grad=True)
    options = {"vocab_size": VOCAB, "temperature": 1.0, "chunk": 4, "group": group}
    outputs = chunked_logprobs(hidden, weight, torch.zeros(0, dtype=torch.int64), **options)
    assert [tuple(value.shape) for value in outputs] == [(0,)] * 3
    (outputs[0].sum() + outputs[1].sum()).backward()
    assert torch.equal(weight.grad, torch.zeros(ROWS, HIDDEN))
