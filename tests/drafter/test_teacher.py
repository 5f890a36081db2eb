"""drafter/teacher.py: features, embeddings and scores are those of the transformers model."""

from __future__ import annotations

import pytest
import torch

from respec_trainer.drafter.teacher import HFTeacher, draft_scores
from tests.support.drafters import DRAFT_IDS, random_rollouts, target_config
from tests.support.models import save_tiny_model, tiny_model

LAYERS = (0, 2, 4)


@pytest.fixture(scope="module", params=["qwen3", "qwen2", "llama"])
def target(request, tmp_path_factory):
    config = target_config(request.param, layers=6, tied=request.param == "qwen2")
    return tiny_model(config), save_tiny_model(tmp_path_factory.mktemp("actor"), config)


def test_equals_the_model(target):
    model, folder = target
    rollouts = random_rollouts([(4, 5), (3, 9), (6, 1)])
    output = HFTeacher(folder, DRAFT_IDS, LAYERS)(rollouts)
    with torch.no_grad():
        whole = model(input_ids=rollouts.tokens, output_hidden_states=True)
    # hidden_states[0] is the embedding, so a layer's output has the layer's index plus one. Attention kernels differ
    # (eager here, fused in the teacher), so float32 sums are in another order.
    expected = torch.cat([whole.hidden_states[layer + 1] for layer in LAYERS], -1)
    torch.testing.assert_close(output.features, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.embeddings, whole.hidden_states[0])
    rows, columns = rollouts.response_mask.nonzero(as_tuple=True)
    logits = whole.logits[rows, columns - 1]
    assert output.draft_logits.shape == (15, 64) and output.logsumexp.dtype == torch.float32
    torch.testing.assert_close(output.draft_logits, logits[:, DRAFT_IDS], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.logsumexp, logits.logsumexp(-1), rtol=1e-4, atol=1e-4)


def test_rows_do_not_depend_on_their_padding(target):
    teacher = HFTeacher(target[1], DRAFT_IDS, LAYERS)
    rollouts = random_rollouts([(4, 5), (3, 9)])
    together, alone = teacher(rollouts), teacher(rollouts.rows(torch.tensor([0])))
    torch.testing.assert_close(together.features[:1, :9], alone.features, rtol=1e-4, atol=1e-5)  # sums in another order
    torch.testing.assert_close(together.draft_logits[:5], alone.draft_logits, rtol=1e-4, atol=1e-5)


def test_scores_are_at_the_temperature(target):
    """Divided by T in float64, also in the log-sum-exp over the whole vocabulary; features are as they were."""
    model, folder = target
    rollouts = random_rollouts([(4, 5), (3, 9)])
    cold, plain = (HFTeacher(folder, DRAFT_IDS, LAYERS, temperature=t)(rollouts) for t in (0.25, 1.0))
    with torch.no_grad():
        logits = model(input_ids=rollouts.tokens).logits.double() / 0.25
    rows, columns = rollouts.response_mask.nonzero(as_tuple=True)
    scores = logits[rows, columns - 1]
    torch.testing.assert_close(cold.draft_logits.double(), scores[:, DRAFT_IDS], rtol=1e-4, atol=4e-4)
    torch.testing.assert_close(cold.logsumexp.double(), scores.logsumexp(-1), rtol=1e-4, atol=4e-4)
    assert torch.equal(cold.features, plain.features) and torch.equal(cold.embeddings, plain.embeddings)


def test_nothing_carries_a_gradient(target):
    output = HFTeacher(target[1], DRAFT_IDS, LAYERS)(random_rollouts([(4, 5)]))
    assert not any(tensor.requires_grad for tensor in vars(output).values())


def test_the_last_layer_is_no_feature_layer(target):
    with pytest.raises(ValueError, match="layers 0 to 4"):
        HFTeacher(target[1], DRAFT_IDS, (0, 2, 5))


@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
def test_chunks_change_nothing(chunk):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(11, 8, generator=generator), torch.randn(131, 8, generator=generator)
    whole = hidden @ weight.t()
    logits, logsumexp = draft_scores(hidden, weight, DRAFT_IDS, chunk)
    torch.testing.assert_close(logits, whole[:, DRAFT_IDS])
    torch.testing.assert_close(logsumexp, whole.logsumexp(-1))
