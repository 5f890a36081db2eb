"""The learner saved and loaded: weights, moments, replay buffer and cadence are restored."""

from __future__ import annotations

from respec_trainer.checkpoint.tree import copy_tree, load_tree, save_tree
from tests.support.online import iterate, make_learner, same, save_start, target_model, weights


def test_a_learner_saved_while_it_goes_on_goes_on_alike_later(tmp_path):
    folder, model = save_start(tmp_path), target_model()
    learner = make_learner(folder, retention="reservoir", matrix_lr=1e-2, compare_frozen=True)
    for step in range(3):
        iterate(learner, model, step)
    copied = copy_tree({"learner": learner.state_dict()}, immutable=("learner/buffer",))
    first = [iterate(learner, model, step) for step in range(3, 5)]
    save_tree(tmp_path / "rank0.safetensors", copied)  # later, like the thread does
    other = make_learner(folder, retention="reservoir", matrix_lr=1e-2, compare_frozen=True)
    other.load_state_dict(load_tree(tmp_path / "rank0.safetensors")["learner"])
    second = [iterate(other, model, step) for step in range(3, 5)]
    for one, two in zip(first, second, strict=True):
        assert {k: v for k, v in one.items() if "time" not in k} == {k: v for k, v in two.items() if "time" not in k}
    assert same(weights(learner), weights(other))
    assert len(learner.buffer) == len(other.buffer) > 0
