"""actor/logprob.py on one rank, and its mask of padding. On several: tests/integration/actor/test_logprob.py."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from respec_trainer.actor.logprob import chunked_logprobs, mask_padding
from respec_trainer.actor.truncation import Truncation
from tests.support.truncation import truncate

VOCAB, ROWS, HIDDEN, COUNT = 11, 14, 6, 7
WHOLE, PART = Truncation(), Truncation(6, 0.9)


def exact_logprobs(scores: torch.Tensor, targets: torch.Tensor, truncation: Truncation) -> torch.Tensor:
    """Log-probs [n, V] in float64 of what the truncation keeps of scores [n, V], and of the targets; else -1e9."""
    probs = scores.detach().softmax(-1).numpy()
    kept = [torch.tensor(truncate(row, truncation.top_k, truncation.top_p) > 0) for row in probs]
    kept = torch.stack(kept).scatter(1, targets[:, None], True)
    return scores.masked_fill(~kept, -1e9).log_softmax(-1)


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


@pytest.mark.parametrize("temperature", [1e-10, 1e35])
@pytest.mark.parametrize("truncation", [WHOLE, PART])
def test_no_temperature_gives_padding_a_probability(group, temperature, truncation):
    """The likeliest token has all of the probability at 1e-10; at 1e35 all tokens of the vocabulary are alike."""
    weight = torch.randn(ROWS, HIDDEN, generator=torch.Generator().manual_seed(3))
    hidden = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(4))
    likeliest = (hidden @ weight[:VOCAB].t()).argmax(-1)
    options = {"vocab_size": VOCAB, "temperature": temperature, "chunk": 1, "group": group, "truncation": truncation}
    logprobs, entropies, _ = chunked_logprobs(hidden, weight, likeliest, **options)
    alike = {WHOLE: VOCAB, PART: PART.top_k}[truncation]
    count = 1 if temperature < 1 else alike
    assert logprobs.item() == pytest.approx(-math.log(count), abs=1e-6)
    assert entropies.item() == pytest.approx(math.log(count), abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("truncation", [WHOLE, PART])
def test_values_and_gradients_are_those_of_the_distribution(group, chunk, temperature, dtype, truncation):
    generator = torch.Generator().manual_seed(3)
    hidden = (3 * torch.randn(COUNT, HIDDEN, generator=generator)).to(dtype).requires_grad_()
    weight = torch.randn(ROWS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    targets, factors = (
        torch.randint(0, VOCAB, (COUNT,), generator=generator),
        torch.randn(2, COUNT, generator=generator),
    )
    options = {"vocab_size": VOCAB, "temperature": temperature, "chunk": chunk, "group": group}
    options["truncation"] = truncation
    logprobs, entropies, sums = chunked_logprobs(hidden, weight, targets, **options)
    assert not sums.requires_grad
    with torch.no_grad():
        again = chunked_logprobs(hidden, weight, targets, **options)
    for value, same in zip((logprobs, entropies, sums), again, strict=True):
        assert value.dtype == torch.float32 and torch.equal(value, same)
    found = torch.autograd.grad((logprobs * factors[0] + entropies * factors[1]).sum(), (hidden, weight))

    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    scores = exact[0] @ exact[1][:VOCAB].t() / temperature
    expected = exact_logprobs(scores, targets, truncation)
    values = expected.gather(1, targets[:, None])[:, 0], -(expected.exp() * expected).sum(-1), scores.logsumexp(-1)
    for value, right in zip((logprobs, entropies, sums), values, strict=True):
        torch.testing.assert_close(value.double(), right, rtol=1e-5, atol=2e-5)
    gradients = torch.autograd.grad((values[0] * factors[0] + values[1] * factors[1]).sum(), exact)
    for value, right in zip(found, gradients, strict=True):
        torch.testing.assert_close(value.double(), right, rtol=1e-5, atol=1e-4)
    assert not found[1][VOCAB:].any(), "padding has no gradient"


class TwoRanks:
    """Stands in for two processes: what each of them gives to a reduction is kept for the other's next run."""

    def __init__(self):
        self.rank, self.calls, self.given = 0, 0, {}

    def all_reduce(self, tensor, op=dist.ReduceOp.SUM, group=None):
        self.calls += 1
        self.given[self.rank, self.calls] = tensor.clone()
        other = self.given.get((1 - self.rank, self.calls))
        if other is not None:
            tensor.copy_(torch.maximum(tensor, other) if op == dist.ReduceOp.MAX else tensor + other)


@pytest.mark.parametrize("truncation", [WHOLE, PART])
def test_two_ranks_with_half_of_the_vocabulary_each_have_the_values_of_the_whole(monkeypatch, truncation):
    ranks, generator = TwoRanks(), torch.Generator().manual_seed(3)
    monkeypatch.setattr(dist, "all_reduce", ranks.all_reduce)
    monkeypatch.setattr(dist, "get_rank", lambda group: ranks.rank)
    hidden = 3 * torch.randn(COUNT, HIDDEN, generator=generator)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator)
    weight[0] *= 30  # the largest logits are on the first rank, by far
    targets, factors = torch.arange(4, 4 + COUNT), torch.randn(2, COUNT, generator=generator)
    padded = torch.nn.functional.pad(weight, (0, 0, 0, 1))  # six rows each, the last one padding
    # The largest logits are right in the second run, the sums in the third; each round of a search takes one more.
    for _ in range(3 if truncation.keeps_all else 70):
        found = []
        for ranks.rank in range(2):
            ranks.calls = 0
            mine = [hidden.clone().requires_grad_(), padded[6 * ranks.rank :][:6].clone().requires_grad_()]
            options = {"vocab_size": VOCAB, "temperature": 0.5, "chunk": 100, "group": None}
            options["truncation"] = truncation
            outputs = chunked_logprobs(*mine, targets, **options)
            loss = (outputs[0] * factors[0] + outputs[1] * factors[1]).sum()
            found.append(
                [*outputs[:2], *torch.autograd.grad(loss, mine)]
            )  # computes the chunk again, and reduces again
    exact = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    expected = exact_logprobs(exact[0] @ exact[1].t() / 0.5, targets, truncation)
    logprobs, entropies = expected.gather(1, targets[:, None])[:, 0], -(expected.exp() * expected).sum(-1)
    for values in found:
        torch.testing.assert_close(values[0].double(), logprobs, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(values[1].double(), entropies, rtol=1e-5, atol=1e-4)
    gradients = torch.autograd.grad((logprobs * factors[0] + entropies * factors[1]).sum(), exact)
    torch.testing.assert_close((found[0][2] + found[1][2]).double(), gradients[0], rtol=1e-4, atol=1e-3)
    whole = torch.cat([values[3] for values in found])[:VOCAB]
    torch.testing.assert_close(whole.double(), gradients[1], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("wanted", [0, 1])
def test_one_of_the_two_may_be_differentiated_alone(group, wanted):
    hidden, weight = torch.randn(COUNT, HIDDEN, requires_grad=True), torch.randn(VOCAB, HIDDEN)
    options = {"vocab_size": VOCAB, "temperature": 0.5, "chunk": 3, "group": group}
    options["truncation"] = WHOLE
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
    options["truncation"] = PART
    outputs = chunked_logprobs(hidden, weight, torch.zeros(0, dtype=torch.int64), **options)
    assert [tuple(value.shape) for value in outputs] == [(0,)] * 3
    (outputs[0].sum() + outputs[1].sum()).backward()
    assert torch.equal(weight.grad, torch.zeros(ROWS, HIDDEN))
