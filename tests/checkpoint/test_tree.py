from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from respec_trainer.checkpoint.rng import RandomStates
from respec_trainer.checkpoint.tree import copy_tree, load_tree, save_tree
from respec_trainer.errors import ConfigError
from respec_trainer.weights.safetensors_io import file_digest

TREE = {
    "weights": {"a/b": torch.randn(3, 4), "a": {"b": torch.randn(2).bfloat16()}},
    0: "a number for a key",
    "0": "and the same as text",
    "empty": [torch.zeros(0, 5), (), [], {}],
    "scalar": torch.tensor(7, dtype=torch.int64),
    "flags": torch.tensor([True, False]),
    "view": torch.arange(12.0).view(3, 4).t()[1:],
    "bytes": torch.arange(5, dtype=torch.uint8),
    "plain": (None, True, -1, 1 << 80, 0.1, float("inf"), 'text: "é\n"', [1, (2.5,)]),
}


def assert_same(left, right) -> None:
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert list(left) == list(right)
        assert [type(key) for key in left] == [type(key) for key in right]
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        assert left == right


def test_what_is_loaded_has_the_same_types_and_bits(tmp_path):
    path = tmp_path / "rank0.safetensors"
    facts = save_tree(path, TREE)
    assert_same(load_tree(path), TREE)
    assert facts == {"bytes": path.stat().st_size, "xxh3_128": file_digest(path)}


def test_an_optimizer_goes_on_as_if_it_had_not_stopped(tmp_path):
    def step(model, optimizer):
        model(torch.ones(1, 4)).square().sum().backward()
        optimizer.step()

    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step(model, optimizer)
    save_tree(tmp_path / "a.safetensors", {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    again = torch.nn.Linear(4, 3)
    restored = torch.optim.AdamW(again.parameters(), lr=0.3)
    state = load_tree(tmp_path / "a.safetensors")
    again.load_state_dict(state["model"])
    restored.load_state_dict(state["optimizer"])
    again.zero_grad()
    model.zero_grad()
    step(model, optimizer)
    step(again, restored)
    assert torch.equal(model.weight, again.weight)


@pytest.mark.parametrize(
    ("tree", "path"),
    [
        ({"a": [1, {2}]}, "a/1: set"),
        ({"a": {"b": object()}}, "a/b: object"),
        ({"a": {(1, 2): 3}}, "a: a key that is a tuple"),
        ({"a": torch.zeros(1, dtype=torch.complex64)}, "a: a tensor of torch.complex64"),
    ],
)
def test_what_has_no_place_is_refused_by_its_path(tmp_path, tree, path):
    with pytest.raises(TypeError, match=path):
        save_tree(tmp_path / "a.safetensors", tree)
    assert not any(tmp_path.iterdir())


def test_a_copy_is_not_changed_by_what_follows_but_for_what_never_changes():
    tree = {"learner": {"buffer": [torch.zeros(2)], "weights": torch.zeros(2)}, "learner/bufferless": torch.zeros(2)}
    copied = copy_tree(tree, immutable=("learner/buffer",))
    tree["learner"]["weights"] += 1
    tree["learner/bufferless"] += 1
    assert copied["learner"]["weights"].tolist() == [0, 0]
    assert copied["learner/bufferless"].tolist() == [0, 0]
    assert copied["learner"]["buffer"][0].data_ptr() == tree["learner"]["buffer"][0].data_ptr()
    assert copied["learner"]["buffer"] is not tree["learner"]["buffer"]
    assert_same(copy_tree(TREE), TREE)
    with pytest.raises(TypeError, match="a/1: set has no place"):
        copy_tree({"a": (0, {1})})


def test_another_file_and_a_truncated_one_are_named(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="other.safetensors is not a file of states"):
        load_tree(tmp_path / "other.safetensors")
    path = tmp_path / "cut.safetensors"
    save_tree(path, TREE)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"cut\.safetensors cannot be read"):
        load_tree(path)


def test_random_numbers_go_on_where_they_were(tmp_path):
    import random

    import numpy as np

    def draw():
        # NumPy draws normal numbers in pairs, and keeps the second one.
        return random.random(), random.gauss(), np.random.rand(), np.random.normal(), torch.rand(3).tolist()  # noqa: NPY002

    draw()
    save_tree(tmp_path / "rng.safetensors", RandomStates().state_dict())
    expected = draw()
    draw()
    RandomStates().load_state_dict(load_tree(tmp_path / "rng.safetensors"))
    assert json.dumps(draw()) == json.dumps(expected)


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("now", [True, False])
def test_a_gpu_s_random_numbers_go_on_if_there_was_one_and_is_one(monkeypatch, saved, now):
    restored = []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: torch.tensor([7]))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state: restored.append(state.tolist()))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: saved)
    state = RandomStates().state_dict()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: now)
    RandomStates().load_state_dict(state)
    assert restored == [[7]] * (saved and now)
