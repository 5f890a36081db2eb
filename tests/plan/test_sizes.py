"""plan/sizes.py: the estimated sizes of a drafter against the memory that the Online Learner and torch use."""

from __future__ import annotations

import pytest
import torch

from respec_trainer.config import DrafterConfig
from respec_trainer.drafter.batch import DrafterBatch
from respec_trainer.drafter.eagle3 import Eagle3Drafter
from respec_trainer.drafter.online.updates import DrafterUpdates, drafter_loss
from respec_trainer.drafter.shape import DrafterShape
from respec_trainer.drafter.teacher import TeacherOutput
from respec_trainer.plan.sizes import DrafterSizes
from tests.support.models import tiny_config

ROWS, LENGTH, UNROLL = 2, 2048, 5  # longer than a block of the drafter's attention, and a chunk of its loss


@pytest.fixture(scope="module")
def shape() -> DrafterShape:
    changes = {"hidden_size": 64, "intermediate_size": 192, "max_position_embeddings": 2 * LENGTH}
    return DrafterShape.for_target(tiny_config("qwen2", layers=4, vocab_size=256, **changes), 128)


@pytest.mark.parametrize("matrix_lr", [None, 1e-3])
def test_learning_is_what_the_learner_counts(shape, matrix_lr):
    drafter = Eagle3Drafter(shape)
    updates = DrafterUpdates(drafter, DrafterConfig(weighting="reward", matrix_lr=matrix_lr), 1.0)
    weights = sum(parameter.nbytes for parameter in drafter.parameters())
    counted = updates.nbytes + 2 * weights  # and the served copy
    # Norms count as matrices with one moment each in the plan, and the sums of metrics not at all.
    assert DrafterSizes(shape).learning(matrix_lr is not None, False) == pytest.approx(counted, rel=0.01)
    assert DrafterSizes(shape).parameters == updates.size


def test_activations_are_those_kept(shape):
    drafter = Eagle3Drafter(shape)
    tokens, hidden = ROWS * LENGTH, shape.hidden_size
    mask = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    mask[:, 0] = False
    batch = DrafterBatch(torch.randint(1, 256, (ROWS, LENGTH)), mask, torch.ones(ROWS))
    teacher = TeacherOutput(
        features=torch.randn(ROWS, LENGTH, 3 * hidden).bfloat16(),
        embeddings=torch.randn(ROWS, LENGTH, hidden).bfloat16(),
        draft_logits=torch.randn(int(mask.sum()), shape.draft_vocab_size).bfloat16(),
        logsumexp=torch.full((int(mask.sum()),), 10.0),
    )
    given = {t.untyped_storage().data_ptr() for t in (*drafter.parameters(), *vars(teacher).values()) if t is not None}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
            pack.alive.append(storage)
        return tensor

    pack.alive = []
    settings = DrafterConfig(weighting="reward", unroll=UNROLL)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        drafter_loss(drafter, batch, teacher, settings, 1.0, bf16=True)
    # These hooks do not see the kept inputs of recomputed parts: each step's rotated queries and keys, its values and
    # the compared hidden states. They also miss the teacher's outputs, and the second, float32 copy of the embeddings.
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    unseen = UNROLL * (2 * queries + 4 * keys + 4 * hidden) + 12 * hidden + 2 * shape.draft_vocab_size
    estimate = DrafterSizes(shape).activations(tokens, UNROLL)
    # The estimate of the loss, the masks and the rows of the padding is rough.
    assert estimate == pytest.approx(sum(kept.values()) + tokens * unseen, rel=0.05)
